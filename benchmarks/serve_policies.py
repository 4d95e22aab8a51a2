"""Time between tokens of running answers while a long prompt is prefilled, by policy: over HTTP, in one run.

python -m benchmarks.serve_policies --tokens 8000 --rounds 3. Each policy's server is started once; they take
turns. The bound is what `sps2` promises: 2 x the longest layer of the prefill + the longest decode step.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from openai import AsyncOpenAI

from benchmarks.served import Server, serve
from benchmarks.side_by_side import VOCAB_SIZE, prompt, random_llama
from checkpoints_tools.convert import convert

POLICIES = ("sps2", "sarathi", "fcfs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One long prompt beside running decodes. Milliseconds: gaps as clients see them, steps as ranks do."""

    gaps: list[float]  # between tokens of the running answers, while the prompt was prefilled
    ttft: float  # of the long prompt
    layer: float  # longest layer of its prefill, where a step runs whole layers of it alone
    decode: float  # longest decode step

    @property
    def bound(self) -> float:
        return 2 * self.layer + self.decode

    @property
    def p99(self) -> float:
        return float(np.percentile(self.gaps, 99))


async def _stream(client: AsyncOpenAI, ids: list[int], num_tokens: int, times: list[float]) -> None:
    stream = await client.completions.create(
        model="m",
        prompt=ids,
        max_tokens=num_tokens,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True, "logprobs": 0},
    )
    async for chunk in stream:
        if chunk.choices and chunk.choices[0].logprobs:
            now = time.perf_counter()
            times += [now] * len(chunk.choices[0].logprobs.tokens or [])


async def run_round(server: Server, num_tokens: int, num_decodes: int, seed: int) -> Round:
    """`num_decodes` answers run; then a prompt of `num_tokens` comes; then each of them gets a token more."""
    running: list[list[float]] = [[] for _ in range(num_decodes)]
    first: list[float] = []
    async with AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0) as client:
        asks = (prompt(100 + seed * 97 + i) for i in range(num_decodes))
        tasks = [
            asyncio.create_task(_stream(client, ids, 2000, times))
            for ids, times in zip(asks, running, strict=True)
        ]
        await _until(lambda: min(map(len, running)) >= 5, tasks)
        since, start = time.time(), time.perf_counter()
        # Its own tokens, so that no prefix is cached.
        await _stream(client, [(each + seed) % VOCAB_SIZE for each in prompt(num_tokens)], 1, first)
        # The pause that a whole prefill makes ends with a token after it.
        await _until(lambda: min(times[-1] for times in running) > first[0], tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.sleep(1.0)  # the ranks' last beat
    steps = [s for s in server.json(f"/live?since={since}")["steps"] if s["rank"] == 0]
    alone = [s for s in steps if s["kind"] == "prefill" and s["num_prompt_tokens"] >= num_tokens]
    layers = [1e3 * s["seconds"] / (s["last_layer"] - s["first_layer"]) for s in alone]
    decodes = [1e3 * s["seconds"] for s in steps if s["kind"] == "decode"]
    return Round(
        gaps=[
            1e3 * (late - early)
            for times in running
            for early, late in itertools.pairwise(times)
            if late > start and early < first[0]
        ],
        ttft=1e3 * (first[0] - start),
        layer=max(layers, default=float("nan")),
        decode=max(decodes, default=float("nan")),
    )


async def _until(reached: Callable[[], bool], tasks: Sequence[asyncio.Task[None]]) -> None:
    while not reached():
        await asyncio.sleep(0.02)
        for task in tasks:
            if task.done():
                task.result()


def row(policy: str, rounds: list[Round], bounds: list[float]) -> dict[str, Any]:
    gaps = [gap for each in rounds for gap in each.gaps]
    return {
        "policy": policy,
        "TTFT of the long prompt, s": statistics.median(each.ttft for each in rounds) / 1e3,
        "TBT p50, ms": float(np.percentile(gaps, 50)),
        "TBT p99, ms": float(np.percentile(gaps, 99)),
        "TBT max, ms": max(gaps),
        "layer, ms": max(each.layer for each in rounds),
        "decode step, ms": max(each.decode for each in rounds),
        "p99 within the bound": f"{sum(map(_within, rounds, bounds))} of {len(rounds)} rounds",
    }


def _within(each: Round, bound: float) -> bool:
    return each.p99 < bound


def print_table(rows: list[dict[str, Any]]) -> None:
    print("|", " | ".join(rows[0]), "|")
    print("|" + "---|" * len(rows[0]))
    for each in rows:
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in each.values()]
        print("|", " | ".join(cells), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", help="default: the random 56M Llama")
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--decodes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sp", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as servers:
        checkpoint = args.checkpoint
        if checkpoint is None:
            random_llama().save_pretrained(f"{folder}/hf")
            convert(Path(folder) / "hf", Path(folder) / "checkpoint")
            checkpoint = f"{folder}/checkpoint"
        size = ("--max-model-len", args.tokens + 3000, "--kv-cache-gib", 1)
        flags = ("--sp", args.sp, "--dtype", args.dtype, "--served-model-name", "m", *size)
        running = {
            policy: servers.enter_context(serve(checkpoint, *flags, "--policy", policy))
            for policy in args.policies
        }
        found: dict[str, list[Round]] = {policy: [] for policy in running}
        for seed in range(args.rounds):
            for policy, server in running.items():
                found[policy].append(asyncio.run(run_round(server, args.tokens, args.decodes, seed)))
        # What sps2 promises, by its own layers and decode steps of the same round.
        bounds = [each.bound for each in found.get("sps2", [])] or [float("nan")] * args.rounds
        rows = [row(policy, rounds, bounds) for policy, rounds in found.items()]
    print(f"bounds (2 x layer + decode step of sps2): {', '.join(f'{each:.0f}' for each in bounds)} ms")
    print(json.dumps(rows)) if args.json else print_table(rows)


if __name__ == "__main__":
    main()
