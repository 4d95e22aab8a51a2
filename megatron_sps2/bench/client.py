"""Sends requests to an OpenAI endpoint when they are due, and writes down when each token came.

Open loop: a request leaves at its time, however slow the answers are. An error is a record like any other.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2
import msgspec

from megatron_sps2.bench.record import Record
from megatron_sps2.bench.workload import Ask

MAX_ERROR_CHARS = 300
# How an answer may end; with any other reason it was cut.
WHOLE = ("stop", "length")
PROBE_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where requests go, and what is the same in each."""

    base_url: str  # with or without /v1
    model: str
    api_key: str = ""
    timeout_s: float = 600.0  # of a request, from sending to its last token
    ask_logprobs: bool = True  # tokens are counted by them; without, each chunk counts as one
    extra_body: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0, "ignore_eos": True})

    def body(self, ask: Ask) -> bytes:
        fields: dict[str, Any] = {
            "model": self.model,
            "prompt": ask.prompt,
            "max_tokens": ask.num_output_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ask_logprobs:
            fields["logprobs"] = 0
        return msgspec.json.encode({**fields, **self.extra_body})


@dataclass(frozen=True, slots=True)
class Served:
    """What an endpoint says of its model."""

    model: str
    max_model_len: int | None


# What is read of an endpoint's chunks; all else is passed over.


class _Logprobs(msgspec.Struct):
    tokens: list[str] | None = None


class _Choice(msgspec.Struct):
    text: str | None = ""
    logprobs: _Logprobs | None = None
    finish_reason: str | None = None


class _Details(msgspec.Struct):
    cached_tokens: int | None = 0


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None
    timings: Any = None
    csa: Any = None


_CHUNK = msgspec.json.Decoder(_Chunk)


async def ask_served(base_url: str, model: str | None = None, api_key: str = "") -> Served:
    """The model `model`, or the first one served. ValueError for none such, OSError for no endpoint."""
    try:
        async with _http(base_url, api_key) as http:
            answer = await http.get("v1/models", timeout=PROBE_S)
    except httpx2.HTTPError as error:
        raise OSError(f"{base_url} does not answer ({_said(error)}); check --base-url") from error
    if answer.status_code == 404 and model:
        return Served(model, None)
    if answer.status_code != 200:
        raise OSError(f"{base_url}/v1/models answers {answer.status_code}: {answer.text[:MAX_ERROR_CHARS]}")
    try:
        lengths = {each["id"]: each.get("max_model_len") for each in answer.json()["data"]}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise OSError(
            f"{base_url}/v1/models is no list of models ({_said(error)}); check --base-url"
        ) from error
    if not lengths or model not in (None, *lengths):
        names = ", ".join(lengths) or "none"
        raise ValueError(f"model {model!r} is not served at {base_url}; use one of those that are: {names}")
    name = model or next(iter(lengths))
    return Served(name, lengths[name])


async def run(
    asks: Sequence[Ask],
    endpoint: Endpoint,
    *,
    max_concurrency: int | None = None,
    on_done: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Sends each of `asks` at its arrival_s, or when fewer than `max_concurrency` run -> their records."""
    bodies = [endpoint.body(ask) for ask in asks]  # beforehand: a long prompt takes its milliseconds
    gate: contextlib.AbstractAsyncContextManager[Any] = contextlib.nullcontext()
    if max_concurrency:
        gate = asyncio.Semaphore(max_concurrency)
    async with _http(endpoint.base_url, endpoint.api_key) as http:
        start = time.perf_counter()

        async def one(ask: Ask, body: bytes) -> Record:
            record = _new_record(ask)
            await asyncio.sleep(start + ask.arrival_s - time.perf_counter())
            async with gate:
                await _send(http, body, record, start, endpoint)
            if on_done:
                on_done(record)
            return record

        return await asyncio.gather(*map(one, asks, bodies))


def _new_record(ask: Ask) -> Record:
    return Record(
        index=ask.index,
        due_s=ask.arrival_s,
        num_prompt_tokens=len(ask.prompt),
        num_asked_tokens=ask.num_output_tokens,
    )


def _http(base_url: str, api_key: str) -> httpx2.AsyncClient:
    """As many connections as requests, none of them compressed, no retries, no limit of its own on time."""
    root = base_url.rstrip("/").removesuffix("/v1")
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    # Idle connections are given up before servers close them (uvicorn: 5 s): no request meets a closing one.
    limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=2.0)
    return httpx2.AsyncClient(base_url=f"{root}/", headers=headers, limits=limits, timeout=None)


async def _send(
    http: httpx2.AsyncClient, body: bytes, record: Record, start: float, endpoint: Endpoint
) -> None:
    """Fills `record`, whatever happens."""
    record.sent_s = time.perf_counter() - start
    try:
        async with (
            asyncio.timeout(endpoint.timeout_s),
            http.stream("POST", "v1/completions", content=body) as answer,
        ):
            if answer.status_code != 200:
                said = (await answer.aread()).decode(errors="replace")
                record.error = f"HTTP {answer.status_code}: {said[:MAX_ERROR_CHARS]}"
            else:
                await _read(answer, record, start)
    except TimeoutError:
        record.error = f"not done within {endpoint.timeout_s:g} s"
    except (httpx2.HTTPError, httpx2.StreamError, httpx2.InvalidURL, OSError, msgspec.MsgspecError) as error:
        record.error = _said(error)
    record.end_s = time.perf_counter() - start


async def _read(answer: httpx2.Response, record: Record, start: float) -> None:
    is_whole = False
    async for now, data in _events(answer):
        if data == b"[DONE]":
            is_whole = True
            break
        chunk = _CHUNK.decode(data)
        if chunk.error is not None:
            record.error = str(chunk.error)[:MAX_ERROR_CHARS]
            return
        _note(chunk, record, now - start)
        for reason in filter(None, (choice.finish_reason for choice in chunk.choices)):
            is_whole = True
            if reason not in WHOLE:
                record.error = f"the answer ended with {reason!r} after {sum(record.chunk_tokens)} tokens"
    if not is_whole:
        record.error = f"the stream broke off after {sum(record.chunk_tokens)} tokens"
    elif not record.chunk_times and not record.error:
        record.error = "the answer has no token"
    record.num_output_tokens = record.num_output_tokens or sum(record.chunk_tokens)


async def _events(answer: httpx2.Response) -> AsyncGenerator[tuple[float, bytes], None]:
    """When each `data:` line came, and what it says.

    Cut at line feeds alone: a text may have other line ends in it, which aiter_lines would cut at.
    """
    rest = b""
    async for part in answer.aiter_bytes():
        now = time.perf_counter()
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield now, line[5:].strip()


def _note(chunk: _Chunk, record: Record, now: float) -> None:
    for choice in chunk.choices:
        tokens = choice.logprobs.tokens if choice.logprobs else None
        num_tokens = len(tokens) if tokens is not None else int(bool(choice.text))
        if num_tokens:
            record.chunk_times.append(now)
            record.chunk_tokens.append(num_tokens)
        record.tokens += tokens or []
        record.text += choice.text or ""
    record.extras.update({k: v for k in ("timings", "csa") if (v := getattr(chunk, k)) is not None})
    if chunk.usage:
        record.num_prompt_tokens = chunk.usage.prompt_tokens
        record.num_output_tokens = chunk.usage.completion_tokens
        details = chunk.usage.prompt_tokens_details
        record.num_cached_tokens = (details and details.cached_tokens) or 0


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:MAX_ERROR_CHARS]
