"""POST /v1/completions, as OpenAI has it. Shapes and order of choices; the answers come from Generation."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from megatron_sps2.server.generation import Ask, Generation, Piece
from megatron_sps2.server.protocol import Token
from megatron_sps2.server.sampling import (
    as_prompts,
    check_length,
    check_model,
    check_neutral,
    make_params,
    pick_seed,
    refuse,
)
from megatron_sps2.server.schema import CompletionRequest
from megatron_sps2.server.service import Service, answer_as_stream, answer_at_once, new_id


@dataclass(slots=True)
class _Logprobs:
    """OpenAI's four lists, filled as tokens come."""

    service: Service
    num_top: int
    length: int = 0  # characters of text so far

    def of(self, tokens: Sequence[Token | None], ids: Sequence[int]) -> dict[str, Any]:
        """`tokens[i]` scores token `ids[i]`; None where nothing came before it."""
        texts = [self.service.token_text(each) for each in ids]
        offsets = []
        for text in texts:
            offsets.append(self.length)
            self.length += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [each.logprob if each else None for each in tokens],
            "top_logprobs": [self._top(each) if each else None for each in tokens],
            "text_offset": offsets,
        }

    def _top(self, token: Token) -> dict[str, float]:
        # Two tokens may have the same text: the likelier one stands.
        pairs = sorted(token.top_logprobs[: self.num_top], key=lambda pair: pair[1])
        return {self.service.token_text(token_id): logprob for token_id, logprob in pairs}


@dataclass(slots=True)
class _Plan:
    """One request's prompts and choices. Choice c of prompt p has the index p * n + c."""

    body: CompletionRequest
    prompts: list[list[int]]
    texts: list[str]  # of the prompts, for echo
    asks: list[Ask]
    name: str = field(default_factory=lambda: new_id("cmpl"))
    created: int = field(default_factory=lambda: int(time.time()))

    def prompt_of(self, index: int) -> int:
        return index // self.body.n

    @property
    def silent(self) -> bool:
        """Only the prompt is scored; the one token that the engine makes is not shown."""
        return self.body.max_tokens == 0

    def usage(self, generation: Generation) -> dict[str, Any]:
        return usage(sum(map(len, self.prompts)), generation, silent=self.silent)


def usage(num_prompt: int, generation: Generation, *, silent: bool = False) -> dict[str, Any]:
    num_generated = 0 if silent else generation.num_generated
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_generated,
        "total_tokens": num_prompt + num_generated,
        "prompt_tokens_details": {"cached_tokens": generation.num_cached},
    }


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/completions", summary="Continue a prompt")
    async def completions(body: CompletionRequest, request: Request) -> Response:
        plan = await asyncio.to_thread(_plan, service, body)  # a long text takes seconds
        generation = service.begin(body, plan.asks)
        if body.stream:
            return answer_as_stream(request, plan.name, _events(service, plan, generation))
        return await answer_at_once(request, plan.name, lambda: _whole(service, plan, generation))

    return routes


def _plan(service: Service, body: CompletionRequest) -> _Plan:
    """Everything that can be wrong with a request is found here. ApiError 400, 404 or 503."""
    ready = service.client.ready
    check_model(body.model, service.config.served_model_name)
    check_neutral(body)
    refuse(body.suffix, "suffix is not supported; leave it out", "suffix")
    refuse(
        body.best_of not in (None, body.n),
        f"best_of={body.best_of} must equal n={body.n}; leave it out",
        "best_of",
    )
    max_tokens = service.config.default_max_tokens if body.max_tokens is None else body.max_tokens
    refuse(
        max_tokens == 0 and not body.echo, "max_tokens=0 gives no token; use 1 or more, or echo", "max_tokens"
    )
    prompts = as_prompts(body.prompt, service.tokenizer, service.config.max_prompts_per_request)
    refuse(
        len(prompts) * body.n > service.config.max_prompts_per_request,
        f"{len(prompts)} prompts x n={body.n} exceed {service.config.max_prompts_per_request} choices; send "
        "several requests",
        "n",
    )
    for ids in prompts:
        check_length(ids, max(1, max_tokens), ready)
    seed = pick_seed(body.seed)
    scored = body.logprobs if body.echo else None
    asks = [
        Ask(
            prompt_ids=ids,
            params=make_params(
                body,
                number * body.n + choice,
                seed,
                max_tokens=max(1, max_tokens),
                logprobs=body.logprobs,
                prompt_logprobs=scored,
            ),
        )
        for number, ids in enumerate(prompts)
        for choice in range(body.n)
    ]
    given = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    texts = []
    for text, ids in zip(given, prompts, strict=False):
        texts.append(text if isinstance(text, str) else _decode(service, ids))
    return _Plan(body, prompts, texts if body.echo else [], asks)


def _decode(service: Service, ids: Sequence[int]) -> str:
    return service.tokenizer.decode(ids) if service.tokenizer else ""


async def _choices(
    service: Service, plan: _Plan, generation: Generation
) -> AsyncGenerator[dict[str, Any], None]:
    """The choices' news as OpenAI's choice objects, timings and csa beside."""
    logprobs = [_Logprobs(service, plan.body.logprobs or 0) for _ in plan.asks]
    begun = set[int]()
    async with contextlib.aclosing(service.pieces(plan.name, generation)) as pieces:
        async for piece in pieces:
            first = piece.index not in begun and bool(piece.tokens or piece.finish_reason)
            begun.update([piece.index] if first else [])
            choice = _choice(plan, piece, logprobs[piece.index], first)
            yield {"choice": choice, "timings": piece.timings, "csa": piece.csa}


def _choice(plan: _Plan, piece: Piece, logprobs: _Logprobs, first: bool) -> dict[str, Any]:
    echo = plan.texts[plan.prompt_of(piece.index)] if plan.body.echo and first else ""
    tokens: list[Token | None] = [] if plan.silent else list(piece.tokens)
    ids = [] if plan.silent else [each.token_id for each in piece.tokens]
    if plan.body.echo and first and piece.prompt_logprobs:
        tokens = [*piece.prompt_logprobs, *tokens]
        ids = [*plan.prompts[plan.prompt_of(piece.index)], *ids]
    return {
        "index": piece.index,
        "text": echo + ("" if plan.silent else piece.text),
        "logprobs": logprobs.of(tokens, ids) if plan.body.logprobs is not None else None,
        "finish_reason": piece.finish_reason,
    }


def _head(service: Service, plan: _Plan) -> dict[str, Any]:
    return {
        "id": plan.name,
        "object": "text_completion",
        "created": plan.created,
        "model": service.config.served_model_name,
    }


async def _events(
    service: Service, plan: _Plan, generation: Generation
) -> AsyncGenerator[dict[str, Any], None]:
    async with contextlib.aclosing(_choices(service, plan, generation)) as news:
        async for each in news:
            choice = each["choice"]
            has_news = choice["text"] or choice["finish_reason"] or (choice["logprobs"] or {}).get("tokens")
            if has_news:
                extras = {key: each[key] for key in ("timings", "csa") if each[key]}
                yield {**_head(service, plan), "choices": [choice], **extras}
    if plan.body.stream_options and plan.body.stream_options.include_usage:
        counts = plan.usage(generation)
        yield {**_head(service, plan), "choices": [], "usage": counts}


async def _whole(service: Service, plan: _Plan, generation: Generation) -> dict[str, Any]:
    choices = [
        {"index": i, "text": "", "logprobs": None, "finish_reason": None} for i in range(len(plan.asks))
    ]
    extras: dict[str, Any] = {}
    async with contextlib.aclosing(_choices(service, plan, generation)) as news:
        async for each in news:
            join_choice(choices[each["choice"]["index"]], each["choice"])
            extras.update({key: each[key] for key in ("timings", "csa") if each[key]})
    counts = plan.usage(generation)
    return {**_head(service, plan), "choices": choices, "usage": counts, **extras}


def join_choice(whole: dict[str, Any], new: dict[str, Any]) -> None:
    """Adds a choice's news to what is there of it."""
    whole["text"] += new["text"]
    whole["finish_reason"] = new["finish_reason"] or whole["finish_reason"]
    if new["logprobs"] is not None:
        lists = whole["logprobs"] or {key: [] for key in new["logprobs"]}
        whole["logprobs"] = {key: [*lists[key], *more] for key, more in new["logprobs"].items()}
