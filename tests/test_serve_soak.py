"""Hundreds of requests, half of them troublesome: none without an answer, no block leaked, memory flat."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest

from benchmarks.served import Server, serve
from tests.sps2_command import make_checkpoint
from tests.tiny_llama import VOCAB_SIZE

pytestmark = [pytest.mark.slow, pytest.mark.busy, pytest.mark.timeout(280)]

# For a longer soak: SPS2_SOAK_REQUESTS=1000 python -m pytest tests/test_serve_soak.py
NUM_REQUESTS = int(os.environ.get("SPS2_SOAK_REQUESTS", "250"))
AT_ONCE = 24
# A leak grows by this in every round, of half the requests each; what prompts that happen to run together
# hold at most, which is kept, grows for some rounds.
MEMORY_GROWTH = 8 << 20
MAX_ROUNDS = 6

BAD: list[dict[str, Any]] = [
    {"prompt": []},
    {"prompt": "", "max_tokens": 0},
    {"prompt": [VOCAB_SIZE + 5]},
    {"prompt": [1, "two"]},
    {"prompt": [5], "temperature": -1},
    {"prompt": [5], "n": 0},
    {"prompt": [5], "max_tokens": 10**9},
    {"prompt": [5], "top_p": 7},
    {"prompt": [5] * 5000},
    {"prompt": [5], "model": "nobody"},
    {"prompt": [5], "stop": [""]},
    {"messages": "hello"},
]
KINDS = ("plain", "plain", "stream", "stream", "choices", "disconnect", "abort", "timeout", "bad")


class Crowd:
    """Clients of one server; counts what became of them."""

    def __init__(self, server: Server, client: httpx2.AsyncClient) -> None:
        self.server, self.client = server, client
        self.outcomes: Counter[str] = Counter()

    async def one(self, draw: random.Random) -> None:
        kind = draw.choice(KINDS)
        body: dict[str, Any] = {
            "prompt": [draw.randrange(3, VOCAB_SIZE) for _ in range(int(2 ** draw.uniform(0, 10)))],
            "max_tokens": draw.randrange(1, 24),
            "temperature": draw.choice([0, 1]),
            "ignore_eos": True,
        }
        outcome = await getattr(self, kind)(body, draw)
        self.outcomes[f"{kind}: {outcome}"] += 1

    async def plain(self, body: dict[str, Any], draw: random.Random) -> str:
        reply = await self.client.post("/v1/completions", json=body)
        assert reply.status_code == 200, reply.text
        assert reply.json()["usage"]["completion_tokens"] == body["max_tokens"]
        return "answered"

    async def choices(self, body: dict[str, Any], draw: random.Random) -> str:
        reply = await self.client.post("/v1/completions", json=body | {"n": 3})
        assert reply.status_code == 200 and len(reply.json()["choices"]) == 3, reply.text
        return "answered"

    async def stream(self, body: dict[str, Any], draw: random.Random) -> str:
        async with self.client.stream("POST", "/v1/completions", json=body | {"stream": True}) as reply:
            lines = [line async for line in reply.aiter_lines() if line]
        assert reply.status_code == 200 and lines[-1] == "data: [DONE]", lines[-3:]
        return "answered"

    async def disconnect(self, body: dict[str, Any], draw: random.Random) -> str:
        """Goes away: while it waits, or after some chunks of a stream."""
        endless = body | {"max_tokens": 2000, "stream": draw.random() < 0.5}
        with contextlib.suppress(asyncio.TimeoutError):
            async with asyncio.timeout(draw.uniform(0.0, 0.3)):
                async with self.client.stream("POST", "/v1/completions", json=endless) as reply:
                    assert reply.status_code == 200
                    async for _ in reply.aiter_lines():
                        if draw.random() < 0.2:
                            return "gone in mid-stream"
        return "gone"

    async def abort(self, body: dict[str, Any], draw: random.Random) -> str:
        endless = body | {"max_tokens": 2000, "stream": True}
        async with self.client.stream("POST", "/v1/completions", json=endless) as reply:
            lines = []
            async for line in reply.aiter_lines():
                if not line:
                    continue
                lines.append(line)
                if len(lines) == 2:
                    name = json.loads(line.removeprefix("data: "))["id"]
                    ended = await self.client.post("/abort", json={"request_id": name})
                    assert ended.status_code == 200, ended.text
        assert any('"abort"' in line for line in lines), lines[-3:]
        return "aborted"

    async def timeout(self, body: dict[str, Any], draw: random.Random) -> str:
        reply = await self.client.post("/v1/completions", json=body | {"max_tokens": 2000, "timeout": 0.1})
        assert reply.status_code == 504, reply.text
        return "timed out"

    async def bad(self, body: dict[str, Any], draw: random.Random) -> str:
        wrong = draw.choice(BAD)
        path = "/v1/chat/completions" if "messages" in wrong else "/v1/completions"
        reply = await self.client.post(path, json={"max_tokens": 4, **wrong})
        assert reply.status_code in (400, 404) and reply.json()["error"]["message"], reply.text
        return "refused"


async def run_crowd(server: Server, num_requests: int, seed: int) -> Counter[str]:
    gate = asyncio.Semaphore(AT_ONCE)
    limits = httpx2.Limits(max_connections=AT_ONCE + 8)
    async with httpx2.AsyncClient(base_url=server.base_url, timeout=60, limits=limits) as client:
        crowd = Crowd(server, client)

        async def guarded(number: int) -> None:
            async with gate:
                await crowd.one(random.Random(seed * 100_003 + number))

        await asyncio.gather(*(guarded(number) for number in range(num_requests)))
    return crowd.outcomes


def await_rest(server: Server) -> None:
    """Until nothing runs and the ranks' tables have been compared."""
    end = time.monotonic() + 30
    while server.metric("sps2:num_requests_running") or server.metric("sps2:num_requests_waiting"):
        assert time.monotonic() < end, server.json("/live")
        time.sleep(0.2)
    time.sleep(1.5)


def memory(server: Server) -> dict[int, int]:
    """Resident bytes of each rank and the front end."""
    family = psutil.Process(server.process.pid).children(recursive=True)
    return {p.pid: p.memory_info().rss for p in family if p.ppid() != server.process.pid}


def test_no_block_leaks_and_every_request_is_answered(tmp_path: Path) -> None:
    flags = ("--sp", 2, "--max-model-len", 4096, "--max-num-seqs", 16, "--num-kv-blocks", 150)
    with serve(make_checkpoint(tmp_path), *flags) as server:
        outcomes, growth = asyncio.run(run_crowd(server, NUM_REQUESTS // 2, seed=1)), dict[int, int]()
        await_rest(server)
        num_rounds = 1
        while num_rounds == 1 or max(growth.values()) >= MEMORY_GROWTH and num_rounds < MAX_ROUNDS:
            num_rounds, before = num_rounds + 1, memory(server)
            outcomes += asyncio.run(run_crowd(server, NUM_REQUESTS // 2, seed=num_rounds))
            await_rest(server)
            growth = {pid: size - before[pid] for pid, size in memory(server).items()}
        assert outcomes.total() == num_rounds * (NUM_REQUESTS // 2) and len(outcomes) >= len(set(KINDS)), (
            outcomes
        )
        metrics = server.metrics()
        leaked = [value for name, value in metrics.items() if name.startswith("sps2:kv_blocks_leaked")]
        used = [value for name, value in metrics.items() if name.startswith("sps2:kv_blocks_used")]
        assert leaked == [0, 0] and used == [0, 0], metrics
        assert max(growth.values()) < MEMORY_GROWTH, growth
        assert server.end() == 0
