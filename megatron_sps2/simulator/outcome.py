"""What happened to the requests of a run, simulated or real -> TTFT, TBT, response times, throughput."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """One request; times in seconds since the run's start."""

    arrival_s: float
    num_prompt_tokens: int
    token_times: tuple[float, ...]
    error: str | None = None
    num_preemptions: int = 0
    num_pauses: int = 0

    @property
    def ttft(self) -> float:
        return self.token_times[0] - self.arrival_s

    @property
    def e2e(self) -> float:
        return self.token_times[-1] - self.arrival_s

    @property
    def gaps(self) -> list[float]:
        return [late - early for early, late in itertools.pairwise(self.token_times)]


def spread(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds: mean, percentiles, the largest; empty for no values."""
    if not len(seconds):
        return {}
    values = 1e3 * np.asarray(seconds)
    found = {f"p{rank}": float(np.percentile(values, rank)) for rank in PERCENTILES}
    return {"mean": float(values.mean()), **found, "max": float(values.max())}


def summary(served: Sequence[Served]) -> dict[str, Any]:
    """Plain data; throughput is over the time from the first arrival to the last token."""
    done = [each for each in served if each.error is None]
    gaps = [gap for each in done for gap in each.gaps]
    start = min((each.arrival_s for each in served), default=0.0)
    seconds = max((each.token_times[-1] for each in done), default=start) - start
    tokens_in, tokens_out = sum(e.num_prompt_tokens for e in done), sum(len(e.token_times) for e in done)
    return {
        "completed": len(done),
        "failed": len(served) - len(done),
        "duration_s": seconds,
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": len(done) / seconds if seconds else 0.0,
        "prefill_throughput": tokens_in / seconds if seconds else 0.0,
        "decode_throughput": tokens_out / seconds if seconds else 0.0,
        "ttft_ms": spread([each.ttft for each in done]),
        "tbt_ms": spread(gaps),
        "e2e_ms": spread([each.e2e for each in done]),
        "num_preemptions": sum(each.num_preemptions for each in served),
        "num_pauses": sum(each.num_pauses for each in served),
    }
