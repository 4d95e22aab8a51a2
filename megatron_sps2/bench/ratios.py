"""Summaries of settings -> how many times better than sarathi, in the paper's form. Knows numbers only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Summary = Mapping[str, Any]  # by vLLM's key names

# What it is called here -> in vLLM's keys. Less is better.
TIMES = {"ttft": "ttft", "tbt": "itl", "tpot": "tpot", "e2e": "e2el"}
STATISTICS = ("mean", "p50", "p90", "p99")
# More is better.
THROUGHPUTS = (
    "prefill_throughput",
    "decode_throughput",
    "prefill_throughput_busy",
    "decode_throughput_busy",
)
# Of SPS2 to Sarathi-Serve, "up to" (arXiv 2409.15104).
PAPER = {"ttft": 7.5, "tbt": 1.92, "e2e": 9.8, "prefill_throughput": 8.2, "decode_throughput": 5.2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One setting at one load: all rounds together, and each by itself."""

    pooled: Summary
    rounds: Sequence[Summary]


def ratios(setting: Measured, base: Measured) -> dict[str, Any]:
    """Above 1 is better than `base`: {ttft: {mean: {ratio, min, max}, ...}, ..., prefill_throughput: {...}}.

    min and max are over the rounds, each setting's with the base's of the same round.
    """
    times = {
        name: {stat: _spread(setting, base, f"{stat}_{key}_ms", less_is_better=True) for stat in STATISTICS}
        for name, key in TIMES.items()
    }
    return {**times, **{key: _spread(setting, base, key, less_is_better=False) for key in THROUGHPUTS}}


def best(candidates: Mapping[str, Measured]) -> str | None:
    """The name with the lowest mean response time, of those that have one."""
    found = {name: _number(each.pooled, "mean_e2el_ms") for name, each in candidates.items()}
    return min(
        (name for name in found if found[name] is not None), key=lambda name: found[name] or 0, default=None
    )


def ratios_to_bases(measured: Mapping[str, Measured], bases: Sequence[str]) -> dict[str, Any]:
    """Of one load: which base is best, the ratios to it, and to each base by name."""
    chosen = best({name: measured[name] for name in bases})
    by_base = {
        base: {name: ratios(each, measured[base]) for name, each in measured.items() if name != base}
        for base in bases
    }
    return {"best": chosen, "to_best": by_base[chosen] if chosen else {}, "to": by_base}


def _spread(setting: Measured, base: Measured, key: str, *, less_is_better: bool) -> dict[str, float | None]:
    def ratio(mine: Summary, theirs: Summary) -> float | None:
        upper, lower = (theirs, mine) if less_is_better else (mine, theirs)
        over, under = _number(upper, key), _number(lower, key)
        return None if over is None or not under else over / under

    by_round = [ratio(mine, theirs) for mine, theirs in zip(setting.rounds, base.rounds, strict=True)]
    known = [each for each in by_round if each is not None]
    return {
        "ratio": ratio(setting.pooled, base.pooled),
        "min": min(known, default=None),
        "max": max(known, default=None),
    }


def _number(summary: Summary, key: str) -> float | None:
    """None where nothing was measured, as when every request failed."""
    value = summary.get(key)
    return float(value) if value is not None and math.isfinite(value) else None
