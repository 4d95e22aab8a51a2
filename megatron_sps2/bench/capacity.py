"""The highest request rate that stays within limits: found by doubling, then by bisection.

Knows rates and verdicts; who sends the requests is the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sps2.bench.summary import METRICS, PERCENTILES, parse_limit

LIMIT_NAMES = tuple(
    f"{statistic}_{metric}_ms"
    for metric in METRICS
    for statistic in ("mean", "median", *(f"p{p}" for p in PERCENTILES), "max")
)


@dataclass(frozen=True, slots=True)
class Try:
    """One rate, what came of it, and which limits it missed."""

    rate: float
    summary: Mapping[str, Any]
    missed: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.missed


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchConfig:
    start_rate: float = 1.0
    least_rate: float = 0.01  # below it the search gives up
    most_rate: float = 1000.0
    precision: float = 0.1  # the search ends where the rate that misses is at most so much higher
    max_tries: int = 12

    def __post_init__(self) -> None:
        if not 0 < self.least_rate <= self.start_rate <= self.most_rate < float("inf"):
            raise ValueError(
                f"rates {self.least_rate}, {self.start_rate}, {self.most_rate} (least, first, most) must "
                "rise from above 0; choose the first one between the others"
            )
        if not self.precision > 0:
            raise ValueError(f"precision={self.precision} must be above 0; 0.1 is 10 percent")
        if self.max_tries < 1:
            raise ValueError(f"max_tries={self.max_tries} must be at least 1")


def parse_limits(text: str) -> dict[str, float]:
    """p99_ttft_ms:2000,p99_tpot_ms:200 -> limits in ms. Raises ValueError."""
    return dict(parse_limit(part, LIMIT_NAMES) for part in text.split(","))


def missed(summary: Mapping[str, Any], limits: Mapping[str, float]) -> tuple[str, ...]:
    """In words. A failed request misses, as does a number that could not be measured."""
    found = [f"{summary['failed']} requests failed"] if summary["failed"] else []
    for name, limit in limits.items():
        value = summary[name]
        if value is None:
            found.append(f"{name} was not measured")
        elif value > limit:
            found.append(f"{name} {value:.4g} > {limit:g}")
    return tuple(found)


def search(attempt: Callable[[float], Try], config: SearchConfig) -> list[Try]:
    """All tries in order; `best` of them is the capacity, between it and `worst` nothing was tried."""
    tries = [attempt(config.start_rate)]
    while len(tries) < config.max_tries:
        rate = next_rate(tries, config)
        if rate is None:
            break
        tries.append(attempt(rate))
    return tries


def next_rate(tries: Sequence[Try], config: SearchConfig) -> float | None:
    """None where there is nothing left to try."""
    good, bad = best(tries), worst(tries)
    if bad is None:
        assert good is not None, "a try is good or bad"
        return min(2 * good.rate, config.most_rate) if good.rate < config.most_rate else None
    if good is None:
        return max(bad.rate / 2, config.least_rate) if bad.rate > config.least_rate else None
    if bad.rate <= good.rate * (1 + config.precision):
        return None
    return float((good.rate * bad.rate) ** 0.5)


def best(tries: Sequence[Try]) -> Try | None:
    """The highest rate within the limits below every rate that missed them."""
    bad = worst(tries)
    good = [each for each in tries if each.ok and (bad is None or each.rate < bad.rate)]
    return max(good, key=lambda each: each.rate, default=None)


def worst(tries: Sequence[Try]) -> Try | None:
    """The lowest rate that missed a limit."""
    return min((each for each in tries if not each.ok), key=lambda each: each.rate, default=None)
