"""What was measured, as tables: times of every peer, and ratios of ours to the best of the others. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Cell:
    """One peer at one workload: seconds of each round, or why there are none."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    # Share of the cores that other programs took, of each round.
    others: list[float] = field(default_factory=list)
    absent: str | None = None

    @property
    def best(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times faster one of ours is than the fastest other; by best rounds and by medians."""

    workload: str
    ours: str
    peer: str
    best: float
    median: float


# By workload, then by peer.
Results = Mapping[str, Mapping[str, Cell]]


def ratios(results: Results, ours: Sequence[str]) -> list[Ratio]:
    """None for a workload that nobody else, or none of ours, has finished."""
    found = []
    for workload, cells in results.items():
        done = {name: cell for name, cell in cells.items() if cell.seconds}
        others = {name: cell for name, cell in done.items() if name not in ours}
        if not others:
            continue
        peer = min(others, key=lambda name: others[name].best)
        median = min(cell.median for cell in others.values())
        for name in ours:
            if name in done:
                mine = done[name]
                found.append(Ratio(workload, name, peer, others[peer].best / mine.best, median / mine.median))
    return found


def times_table(results: Results, num_tokens: Mapping[str, int]) -> str:
    """Best and median seconds; num_tokens: of a workload whose rate is shown beside them."""
    peers = list(dict.fromkeys(name for cells in results.values() for name in cells))
    lines = [f"| best / median, s | {' | '.join(peers)} |", "|---" * (len(peers) + 1) + "|"]
    reasons: dict[str, int] = {}
    for workload, cells in results.items():
        shown = [_show(cells.get(name), num_tokens.get(workload), name, reasons) for name in peers]
        lines.append(f"| {workload} | {' | '.join(shown)} |")
    return "\n".join([*lines, "", *(f"[{number}] {reason}" for reason, number in reasons.items())])


def _show(cell: Cell | None, num_tokens: int | None, name: str, reasons: dict[str, int]) -> str:
    if cell is None:
        return ""
    rate = f", {num_tokens / cell.best:.0f} tokens/s" if num_tokens and cell.seconds else ""
    times = f"{cell.best:.3g} / {cell.median:.3g}{rate}" if cell.seconds else "-"
    if cell.absent is None:
        return times
    number = reasons.setdefault(f"{name}: {cell.absent}", len(reasons) + 1)
    return f"{times} [{number}]"


def ratios_table(found: Sequence[Ratio]) -> str:
    lines = ["| workload | ours | fastest other | ratio, best | ratio, median |", "|---|---|---|---|---|"]
    for each in found:
        cells = each.workload, each.ours, each.peer, f"{each.best:.2f}x", f"{each.median:.2f}x"
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def agreement(results: Results, reference: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """By peer: how many first tokens are the reference's, over the workloads that it has run."""
    counts: dict[str, list[bool]] = {}
    for workload, right in reference.items():
        for name, cell in results[workload].items():
            if cell.tokens:
                counts.setdefault(name, []).extend(a == b for a, b in zip(cell.tokens, right, strict=True))
    return {name: f"{sum(same)} of {len(same)}" for name, same in counts.items()}


def as_json(results: Results, found: Sequence[Ratio]) -> dict[str, Any]:
    return {
        "results": {
            workload: {name: _cell_json(cell) for name, cell in cells.items()}
            for workload, cells in results.items()
        },
        "ratios": [
            {
                "workload": each.workload,
                "ours": each.ours,
                "peer": each.peer,
                "best": each.best,
                "median": each.median,
            }
            for each in found
        ],
    }


def _cell_json(cell: Cell) -> dict[str, Any]:
    times = {"best": cell.best, "median": cell.median} if cell.seconds else {}
    lists = {"seconds": cell.seconds, "tokens": cell.tokens, "others": cell.others}
    return {**times, **lists, "absent": cell.absent}
