"""What starting an engine took: seconds, and memory of every rank."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

MEGABYTE = 1e6
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True, slots=True, kw_only=True)
class StartUp:
    """Of one rank, when its model is loaded."""

    load_seconds: float  # of reading and laying out the weights
    seconds: float  # since the process began: imports and the rendezvous too
    weight_bytes: int  # of this rank's shard
    peak_bytes: int  # the most memory that the process has held, pages of mapped files included

    @classmethod
    def now(cls, load_seconds: float, weight_bytes: int) -> StartUp:
        return cls(
            load_seconds=load_seconds,
            seconds=time.time() - psutil.Process().create_time(),
            weight_bytes=weight_bytes,
            peak_bytes=peak_bytes(),
        )


def peak_bytes() -> int:
    """Of this process since it began; a rank that was forked begins with what its parent held."""
    if _STATUS.is_file():
        # getrusage's figure outlives exec: a program started by a larger one would show that one's memory.
        lines = _STATUS.read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage's own unit
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def start_up_json(ranks: Sequence[StartUp]) -> dict[str, Any]:
    """By rank, under the names of the fields."""
    return {name: [asdict(rank)[name] for rank in ranks] for name in StartUp.__dataclass_fields__}


def in_words(ranks: Sequence[StartUp]) -> str:
    """One line: the slowest and the largest rank count."""
    most = {name: max(values) for name, values in start_up_json(ranks).items()}
    return (
        f"{most['load_seconds']:,.1f} s, {most['weight_bytes'] / MEGABYTE:,.0f} MB of weights a rank, peak "
        f"memory {most['peak_bytes'] / MEGABYTE:,.0f} MB; ready {most['seconds']:,.1f} s after the start"
    )
