"""A long prompt through the engine, end to end on one rank: time to the first token and between tokens."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.case import Absent, Bench, Case, Row
from benchmarks.gpu.model import random_forward, shape, world_of_one

K = 1024
NUM_TOKENS = 32
SMOLLM2 = "SmolLM2-135M-Instruct"


def cases(bench: Bench) -> Iterator[Case]:
    long = bench.pick(full=128 * K, quick=32 * K, tiny=70)
    yield Case(name="random weights", measure=partial(_random, bench, long))
    yield Case(name=SMOLLM2, measure=partial(_smollm2, bench, bench.pick(full=8000, quick=8000, tiny=40)))


def _random(bench: Bench, num_tokens: int) -> Row:
    from megatron_sps2.engine.engine_config import EngineConfig

    model = shape(bench)
    with world_of_one() as groups:
        forward, context = random_forward(bench, groups, torch.bfloat16)
        from megatron_sps2.engine.build import assemble, heads_of
        from megatron_sps2.engine.kernel_check import settle_kernels

        config = EngineConfig(checkpoint="", **_settings(bench, num_tokens))
        kernels = settle_kernels("auto", heads_of(config, forward.model), groups.world)
        engine = assemble(config, groups, forward, context, kernels)
        return _answer(engine, num_tokens, f"{model.num_layers} layers of hidden {model.hidden_size}")


def _smollm2(bench: Bench, num_tokens: int) -> Row:
    folder = Path(os.environ.get("SPS2_CACHE", "~/.cache/megatron_sps2")).expanduser() / SMOLLM2
    if not folder.exists():
        raise Absent(f"{folder} is not there; `make model` makes it")
    with world_of_one():
        from megatron_sps2.engine.build import EngineConfig, build_engine

        engine = build_engine(EngineConfig(checkpoint=str(folder), **_settings(bench, num_tokens)))
        return _answer(engine, num_tokens, SMOLLM2)


def _settings(bench: Bench, num_tokens: int) -> dict[str, Any]:
    return {
        "dtype": "bfloat16",
        "device": str(bench.device),
        "max_model_len": num_tokens + NUM_TOKENS,
    }


def _answer(engine: Any, num_tokens: int, name: str) -> Row:
    """Twice: what is slow once only, such as compiling kernels, is over in the second answer."""
    for _ in range(2):
        times = _times(engine, num_tokens)
    engine.stop()
    ttft, gaps = times[0], [after - before for before, after in zip(times, times[1:], strict=False)]
    return Row(
        shape=f"{name}, prompt of {num_tokens}, bf16",
        milliseconds=1e3 * ttft,
        rate=num_tokens / ttft,
        unit="tokens/s",
        note=f"TTFT; then TBT {1e3 * statistics.median(gaps):.2f} ms, worst {1e3 * max(gaps):.2f} ms",
    )


def _times(engine: Any, num_tokens: int) -> list[float]:
    """Seconds from the request to each of its tokens; a token is on the host when it counts."""
    from megatron_sps2.config import SamplingParams

    ids = torch.randint(3, engine.model.vocab_size, (num_tokens,)).tolist()
    start, times = time.perf_counter(), list[float]()
    request = engine.add_request(ids, SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True))
    while request.finish_reason is None:
        engine.step()
        if len(request.output_ids) > len(times):
            times.append(time.perf_counter() - start)
    engine.release(request)
    return times
