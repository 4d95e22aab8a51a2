"""The client against an endpoint that fails in every way: each request is a record, and nothing hangs."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from megatron_sps2.bench.arrivals import ArrivalConfig
from megatron_sps2.bench.client import Endpoint, ask_served, run
from megatron_sps2.bench.record import Record
from megatron_sps2.bench.session import Session
from megatron_sps2.bench.summary import summarize
from megatron_sps2.bench.trace import Planned
from megatron_sps2.bench.workload import Ask, WorkloadConfig

OK, REFUSED, BROKEN, SILENT, SAID, CLOSED, ODD, EMPTY, BUNCHED, NOT_JSON, CUT = KINDS = range(11)
USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}


@dataclass
class FakeEndpoint:
    """Does what a prompt's first token says, a few milliseconds between its events."""

    url: str = ""
    running: int = 0
    most_running: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[str] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.headers.append(head)
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            if head.startswith("GET"):
                _answer(writer, 200, {"data": [{"id": "m", "max_model_len": 64}, {"id": "n"}]})
            else:
                size = int(head.lower().partition("content-length: ")[2].partition("\r")[0])
                self.bodies.append(json.loads(await reader.readexactly(size)))
                await self._complete(writer, self.bodies[-1]["prompt"][0])
            await writer.drain()
        except ConnectionError:
            pass
        finally:
            self.running -= 1
            writer.close()

    async def _complete(self, writer: asyncio.StreamWriter, what: int) -> None:
        if what == REFUSED:
            _answer(writer, 400, {"error": {"message": "no such token"}})
        elif what != CLOSED:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
            for event in _events(what):
                await asyncio.sleep(0.02)
                # In two halves, as a network may cut them anywhere.
                for half in (event[: len(event) // 2], event[len(event) // 2 :]):
                    writer.write(half)
                    await writer.drain()
            if what == SILENT:
                await asyncio.sleep(9)


def _answer(writer: asyncio.StreamWriter, status: int, body: Any) -> None:
    data = json.dumps(body).encode()
    writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)


def _events(what: int) -> list[bytes]:
    tokens = [["a"], ["b"], ["c"]] if what != BUNCHED else [["a"], ["b", "c"]]
    if what == ODD:
        tokens = [["a\u2028"], ["b\x85"], ["c"]]  # no line ends, though Python's splitlines says so
    chunks = [{"choices": [{"text": "".join(each), "logprobs": {"tokens": each}}]} for each in tokens]
    reason = "abort" if what == CUT else "length"
    end = {"choices": [{"text": "", "logprobs": None, "finish_reason": reason}], "timings": {"x": 1}}
    whole = [*chunks, end, {"choices": [], "usage": USAGE}]
    if what == EMPTY:
        whole = [end]
    if what in (BROKEN, SILENT):
        whole = chunks[:2]
    if what == SAID:
        whole = [chunks[0], {"error": {"message": "rank 1 was lost"}}]
    lines = [f"data: {json.dumps(each, ensure_ascii=False)}\n\n".encode() for each in whole]
    if what == NOT_JSON:
        lines[1] = b"data: {oh\n\n"
    return [*lines, *([] if what in (BROKEN, SILENT, SAID) else [b"data: [DONE]\n\n"])]


@asynccontextmanager
async def fake_endpoint() -> AsyncIterator[FakeEndpoint]:
    fake = FakeEndpoint()
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    yield fake
    server.close()


def ask(index: int, what: int, arrival_s: float = 0.0) -> Ask:
    return Ask(index=index, arrival_s=arrival_s, prompt=[what, 7], num_output_tokens=3)


async def send(
    *asks: Ask, max_concurrency: int | None = None, **changes: Any
) -> tuple[list[Record], FakeEndpoint]:
    async with fake_endpoint() as fake:
        endpoint = replace(Endpoint(base_url=f"{fake.url}/v1", model="m", timeout_s=1.5), **changes)
        return await run(asks, endpoint, max_concurrency=max_concurrency), fake


@pytest.fixture(scope="module")
def mixed() -> list[Record]:
    """One request of each kind, twice, all at once."""
    kinds = [*KINDS, *KINDS]
    start = time.monotonic()
    records, _ = asyncio.run(send(*(ask(i, what) for i, what in enumerate(kinds))))
    assert time.monotonic() - start < 8  # the silent one's limit is 1.5 s
    return records


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (REFUSED, 'HTTP 400: {"error": {"message": "no such token"}}'),
        (BROKEN, "the stream broke off after 2 tokens"),
        (SILENT, "not done within 1.5 s"),
        (SAID, "{'message': 'rank 1 was lost'}"),
        (CLOSED, "RemoteProtocolError: "),
        (EMPTY, "the answer has no token"),
        (NOT_JSON, "DecodeError: JSON is malformed"),
        (CUT, "the answer ended with 'abort' after 3 tokens"),
    ],
)
def test_a_failure_is_a_record_that_says_why(mixed: list[Record], what: int, said: str) -> None:
    for record in (mixed[what], mixed[what + len(KINDS)]):
        assert record.error.startswith(said) and not record.ok
        assert record.end_s >= record.sent_s > 0


def test_whole_answers_beside_failures_are_counted_right(mixed: list[Record]) -> None:
    found = summarize(mixed)
    assert (found["completed"], found["failed"]) == (6, 16)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (54, 18)
    assert (found["total_cached_tokens"], found["error_counts"]["not done within 1.5 s"]) == (12, 2)
    assert [each.index for each in mixed] == list(range(22))


@pytest.mark.parametrize(("what", "text"), [(OK, "abc"), (ODD, "a\u2028b\x85c"), (BUNCHED, "abc")])
def test_tokens_are_written_down_as_they_come(mixed: list[Record], what: int, text: str) -> None:
    record = mixed[what]
    assert (record.text, "".join(record.tokens), record.num_output_tokens) == (text, text, 3)
    assert record.extras == {"timings": {"x": 1}}
    assert len(record.tbt_s) == 2 and 0.02 < record.ttft_s < record.e2e_s
    zero_gaps = sum(gap == 0 for gap in record.tbt_s)
    assert (zero_gaps, record.chunk_tokens) == ((1, [1, 2]) if what == BUNCHED else (0, [1, 1, 1]))


def test_requests_leave_when_they_are_due_however_slow_the_answers() -> None:
    records, fake = asyncio.run(send(*(ask(i, SILENT, arrival_s=0.05 * i) for i in range(4))))
    for record in records:
        assert record.due_s <= record.sent_s < record.due_s + 1.0  # none waited for one before
    assert fake.most_running == 4


def test_concurrency_is_a_limit() -> None:
    records, fake = asyncio.run(send(*(ask(i, OK) for i in range(6)), max_concurrency=2))
    assert fake.most_running == 2 and all(record.ok for record in records)
    assert records[5].sent_s > records[0].end_s


def test_requests_say_what_was_asked() -> None:
    body = {"temperature": 0.5}
    _, fake = asyncio.run(send(ask(0, OK), api_key="a-secret", extra_body=body, ask_logprobs=False))
    assert fake.bodies == [
        {
            "model": "m",
            "prompt": [OK, 7],
            "max_tokens": 3,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.5,
        }
    ]
    assert "authorization: bearer a-secret" in fake.headers[0].lower()


def test_an_endpoint_says_what_it_serves() -> None:
    async def both() -> None:
        async with fake_endpoint() as fake:
            first, second = await ask_served(fake.url), await ask_served(f"{fake.url}/v1/", "n")
            assert (first.model, first.max_model_len) == ("m", 64)
            assert (second.model, second.max_model_len) == ("n", None)
            with pytest.raises(ValueError, match="model 'x' is not served at .*; use one of .*: m, n"):
                await ask_served(fake.url, "x")
        with pytest.raises(OSError, match="does not answer .*; check --base-url"):
            await ask_served(fake.url)

    asyncio.run(both())


def test_warm_ups_and_tries_have_tokens_of_their_own() -> None:
    session = Session(
        endpoint=Endpoint(base_url="", model="m"),
        planned=[Planned(arrival_s=i, num_prompt_tokens=30, num_output_tokens=2) for i in range(5)],
        workload=WorkloadConfig(vocab_size=1000),
        arrivals=ArrivalConfig(kind="poisson", request_rate=4.0),
    )
    first, again, other = session.asks(), session.asks(), session.asks(salt=1)
    assert first == again
    assert all(a.prompt != b.prompt for a, b in zip(first, other, strict=True))
    assert [each.arrival_s for each in first] == [each.arrival_s for each in other] == session.times()
