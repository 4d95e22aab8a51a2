"""Measured steps -> what each kind of work costs: least squares without negative prices.

A step's error counts by its share of the step, and a step that something else held up counts less.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_sps2.config import DType
from megatron_sps2.simulator.profile import DeviceProfile, Link, Overheads
from megatron_sps2.simulator.work import Work

Array = NDArray[np.float64]
OVERHEADS = ("steps", "layers", "piece_layers", "row_layers", "samples")
RATES = ("matmul_flops", "weight_bytes", "attention_flops", "kv_bytes")
# Prices of one node's links; nothing measures another's.
LINKS = ("intra_bytes", "intra_rounds")
# Work that costs nothing that could be told from the rest.
FREE_RATE = 1e18
# Relative errors above it count linearly, not by their square.
HUBER = 0.05
ROUNDS = 20


@dataclass(frozen=True, slots=True)
class Observation:
    """One step that was run."""

    work: Work
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """Seconds of one unit of each kind of work, and how far the fitted steps are from it."""

    price: Mapping[str, float]
    median_error: float  # relative, without sign
    p90_error: float
    bias: float  # of all steps' seconds together: 0.1 is a model that says 10% too much
    num_steps: int
    num_ranks: int  # that ran a step together

    @property
    def unpriced(self) -> list[str]:
        """Work that ranks do and that cost nothing by itself: never seen, or not to be told from the rest."""
        kinds = (*RATES, *LINKS) if self.num_ranks > 1 else RATES
        return [name for name in kinds if not self.price[name]]


def columns(work: Work) -> dict[str, float]:
    """What is priced. One node's bytes are of one kind, whatever travels."""
    found = {name: getattr(work, name) for name in (*OVERHEADS, *RATES)}
    intra_bytes = work.exchange_intra_bytes + work.sent_intra_bytes
    return found | {"intra_bytes": intra_bytes, "intra_rounds": work.intra_rounds}


def fit(observations: Sequence[Observation], num_ranks: int) -> Fit:
    """`num_ranks` is sp x tp. Raises ValueError where there are too few steps."""
    names = [*OVERHEADS, *RATES, *LINKS]
    rows = np.array([[columns(each.work)[name] for name in names] for each in observations], dtype=float)
    seconds = np.array([each.seconds for each in observations])
    if len(rows) < 2 * len(names):
        raise ValueError(
            f"{len(rows)} measured steps are too few to fit {len(names)} prices; raise --budget-s"
        )
    relative = rows / seconds[:, None]
    scale = relative.max(axis=0)
    used = scale > 0
    prices = np.zeros(len(names))
    prices[used] = robust(relative[:, used] / scale[used]) / scale[used]
    error = rows @ prices / seconds - 1
    return Fit(
        price=dict(zip(names, map(float, prices), strict=True)),
        median_error=float(np.median(np.abs(error))),
        p90_error=float(np.percentile(np.abs(error), 90)),
        bias=float((rows @ prices).sum() / seconds.sum() - 1),
        num_steps=len(rows),
        num_ranks=num_ranks,
    )


def robust(rows: Array) -> Array:
    """x >= 0 for which rows @ x is about 1; [m, n] -> [n]."""
    weights, found = np.ones(len(rows)), np.zeros(rows.shape[1])
    for _ in range(ROUNDS):
        found = non_negative(rows * weights[:, None], weights)
        error = np.abs(rows @ found - 1)
        weights = np.sqrt(HUBER / np.maximum(error, HUBER))
    return found


def non_negative(a: Array, b: Array) -> Array:
    """argmin |a x - b|, x >= 0: the active set of Lawson and Hanson."""
    size = a.shape[1]
    x, passive = np.zeros(size), np.zeros(size, dtype=bool)
    for _ in range(10 * size):
        gradient = a.T @ (b - a @ x)
        gradient[passive] = -np.inf
        if passive.all() or gradient.max() <= 1e-10 * max(1.0, float(np.abs(a.T @ b).max())):
            break
        passive[gradient.argmax()] = True
        x = _inner(a, b, x, passive)
    return x


def _inner(a: Array, b: Array, x: Array, passive: NDArray[np.bool_]) -> Array:
    """The best point of the passive columns, or the first on the way to it where one becomes 0."""
    while True:
        best = np.zeros_like(x)
        best[passive] = np.linalg.lstsq(a[:, passive], b, rcond=None)[0]
        if not passive.any() or best[passive].min() > 0:
            return best
        falling = passive & (best <= 0)
        step = float((x[falling] / np.maximum(x[falling] - best[falling], 1e-300)).min())
        x = x + step * (best - x)
        passive &= x > 1e-14
        x[~passive] = 0


def as_profile(
    found: Fit,
    *,
    name: str,
    source: str,
    dtype: DType,
    memory_bytes: int,
    devices_per_node: int,
    notes: Mapping[str, Any],
) -> DeviceProfile:
    price = found.price
    rate = {kind: min(FREE_RATE, 1 / price[kind]) if price[kind] else FREE_RATE for kind in (*RATES, *LINKS)}
    link = Link(bandwidth=rate["intra_bytes"], latency_s=price["intra_rounds"])
    errors = {key: getattr(found, key) for key in ("num_steps", "median_error", "p90_error", "bias")}
    return DeviceProfile(
        name=name,
        source=source,
        matmul_flops={dtype: rate["matmul_flops"]},
        attention_flops={dtype: rate["attention_flops"]},
        weight_bandwidth=rate["weight_bytes"],
        kv_bandwidth=rate["kv_bytes"],
        intra=link,
        inter=link,
        memory_bytes=memory_bytes,
        devices_per_node=devices_per_node,
        overheads=Overheads(
            step_s=price["steps"],
            layer_s=price["layers"],
            piece_layer_s=price["piece_layers"],
            row_layer_s=price["row_layers"],
            sample_s=price["samples"],
        ),
        notes={
            "fit": errors,
            "unpriced": found.unpriced,
            "inter": "one node was measured; between nodes as inside one",
            **notes,
        },
    )
