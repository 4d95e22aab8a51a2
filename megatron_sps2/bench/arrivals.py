"""When requests are sent, in seconds after the start. Knows numbers only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

KINDS = ("trace", "poisson", "gamma", "constant", "closed")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalConfig:
    """`closed`: all are ready at once and a limit on how many run (the client's) spaces them."""

    kind: str = "trace"
    # Per second: of poisson, gamma and constant; a trace's times are rescaled to it, unless it is inf.
    request_rate: float = math.inf
    burstiness: float = 1.0  # shape of gamma: 1 is poisson, below it burstier, above it more even
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"arrivals {self.kind!r} are not known; use {', '.join(KINDS)}")
        if not self.request_rate > 0:
            raise ValueError(f"request_rate={self.request_rate} must be above 0")
        if not 0 < self.burstiness < math.inf:
            raise ValueError(f"burstiness={self.burstiness} must be above 0 and finite")
        if self.kind in ("poisson", "gamma", "constant") and self.request_rate == math.inf:
            raise ValueError(f"arrivals {self.kind!r} need a rate; give --request-rate, or use closed")


def arrival_times(config: ArrivalConfig, traced: Sequence[float]) -> list[float]:
    """One time for each of `traced`, the times of the trace, which the kind `trace` keeps."""
    if config.kind == "closed":
        return [0.0] * len(traced)
    if config.kind == "trace" and config.request_rate == math.inf:
        return list(traced)
    gaps = np.diff(traced) if config.kind == "trace" else _gaps(config, len(traced) - 1)
    return [0.0, *np.cumsum(_at_rate(gaps, config.request_rate)).tolist()]


def _at_rate(gaps: np.ndarray, rate: float) -> np.ndarray:
    """Rescaled to the rate's mean, so that every seed offers the same load."""
    if len(gaps) and not gaps.sum():
        raise ValueError("all requests of the trace come at once: no rate can be given to them; use poisson")
    return gaps * len(gaps) / (rate * gaps.sum()) if len(gaps) else gaps


def _gaps(config: ArrivalConfig, num_gaps: int) -> np.ndarray:
    if config.kind == "constant":
        return np.ones(num_gaps)
    shape = config.burstiness if config.kind == "gamma" else 1.0
    return np.random.default_rng((config.seed, num_gaps)).gamma(shape, size=num_gaps)
