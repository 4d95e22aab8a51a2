"""Which layout and attention answers soonest, by GPUs and prompt length: simulated from data sheets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.simulated_mix import K, capacity, deployment, prefill_s, trace
from megatron_sps2.config import ModelConfig, ParallelConfig, divisors
from megatron_sps2.simulator.shapes import SHAPES

# What each kind may run; chunked prefill with the better of two chunk sizes.
SETTINGS = {
    "chunked": ("sarathi-2048", "sarathi-8192"),
    "SP": ("sps2-exact",),
    "TP+SP": ("sps2-exact",),
    "CSA": ("sps2-csa",),
}
KINDS = tuple(SETTINGS)
GPUS = (8, 64, 256, 1024)
LENGTHS = (32 * K, 128 * K, 1024 * K)
# 405B in bfloat16 does not fit 8 GPUs of 80 GB, and tp stays in a node.
MAPPED = {"llama3-8b": "h100", "llama3-70b": "h100", "llama3-405b": "h200"}


def layouts(model: ModelConfig, num_gpus: int, kind: str) -> Iterator[ParallelConfig]:
    """One replica each; what is left of the GPUs are more replicas."""
    for tp_size in divisors(model.num_attention_heads, model.num_query_groups, 8):
        for sp_size in (2**i for i in range(8)):
            is_kind = {"SP": tp_size == 1, "TP+SP": tp_size > 1 and sp_size > 1}.get(kind, True)
            if is_kind and sp_size * tp_size <= num_gpus:
                yield ParallelConfig(sp_size=sp_size, tp_size=tp_size)


def mapped(
    profile: str, name: str, num_gpus: int, longest: int, num_requests: int, load: float
) -> dict[str, Any]:
    """Each kind's best layout under one load of the whole cluster: the same requests for everybody."""
    model = SHAPES[name]
    one = deployment(profile, model, ParallelConfig(tp_size=8), "sps2-exact", longest)
    rate = load * capacity(one, longest) * num_gpus / 8
    found = {}
    for kind in KINDS:
        tried = [
            _loaded(profile, model, setting, grid, num_gpus, longest, rate, num_requests)
            for setting in SETTINGS[kind]
            for grid in _best(profile, model, kind, setting, num_gpus, longest, rate)
        ]
        found[kind] = min(tried, key=lambda each: each["e2e_s"]) if tried else None
    able = {kind: each for kind, each in found.items() if each}
    winner = min(able, key=lambda kind: able[kind]["e2e_s"]) if able else None
    exact = min((k for k in able if k != "CSA"), key=lambda kind: able[kind]["e2e_s"], default=None)
    return {
        "model": name,
        "profile": profile,
        "num_gpus": num_gpus,
        "longest": longest,
        "kinds": found,
        "winner": winner,
        "winner_exact": exact,
    }


def _best(
    profile: str, model: ModelConfig, kind: str, setting: str, num_gpus: int, longest: int, rate: float
) -> list[ParallelConfig]:
    """The two layouts with the least estimated time: a prefill, and its queue as of one server at random."""
    ranked = []
    for grid in layouts(model, num_gpus, kind):
        option = deployment(profile, model, grid, setting, longest)
        if option.memory.fits:
            replicas = num_gpus // grid.world_size
            busy = rate / replicas / capacity(option, longest)
            queue = busy / (1 - busy) if busy < 1 else 10 * busy
            ranked.append((prefill_s(option, longest) * (1 + queue), grid.tp_size, grid.sp_size))
    return [ParallelConfig(sp_size=sp, tp_size=tp) for _, tp, sp in sorted(ranked)[:2]]


def _loaded(
    profile: str,
    model: ModelConfig,
    setting: str,
    grid: ParallelConfig,
    num_gpus: int,
    longest: int,
    rate: float,
    num_requests: int,
) -> dict[str, Any]:
    """One replica under its share of the load."""
    replicas = num_gpus // grid.world_size
    option = deployment(profile, model, grid, setting, longest)
    result = option.run(trace(longest, num_requests, rate / replicas)).to_json()
    return {
        "setting": setting,
        "tp": grid.tp_size,
        "sp": grid.sp_size,
        "dp": replicas,
        "e2e_s": result["e2e_ms"]["mean"] / 1e3,
        "ttft_s": result["ttft_ms"]["mean"] / 1e3,
        "tbt_p99_ms": result["tbt_ms"]["p99"],
    }
