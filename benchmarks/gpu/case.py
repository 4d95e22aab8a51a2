"""What is measured: a case, the row that it gives, and how it went."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

import torch

T = TypeVar("T")
Size = Literal["full", "quick", "tiny"]
Status = Literal["ok", "wrong", "error", "absent"]


class Absent(Exception):
    """What a case needs is not installed, not written or does not fit here; the text names it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Where and how large."""

    device: torch.device
    size: Size

    def pick(self, *, full: T, quick: T, tiny: T) -> T:
        return {"full": full, "quick": quick, "tiny": tiny}[self.size]

    def needs(self, num_bytes: float, what: str) -> None:
        """Raises Absent where the device has not so much free."""
        if self.device.type == "cuda":
            free = torch.cuda.mem_get_info(self.device)[0]
            if num_bytes > 0.95 * free:
                raise Absent(f"{what} needs {num_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Of outputs against a reference in fp32 or fp64; memory that outputs are made in was NaN before."""

    error: float  # root mean square of the difference, relative to the reference's
    limit: float
    num_not_finite: int  # numbers of the whole output

    @property
    def passed(self) -> bool:
        # NaN is not below the limit.
        return self.num_not_finite == 0 and self.error <= self.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table."""

    shape: str
    milliseconds: float = math.nan
    rate: float = math.nan  # in `unit`
    unit: str = ""
    check: Check | None = None
    # By name of what does the same: its time divided by ours, above 1 where we are faster.
    ratios: dict[str, float] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str
    measure: Callable[[], Row]


Cases = Callable[[Bench], Iterator[Case]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a case went; `detail` says what is absent, or is the traceback of an error."""

    section: str
    case: str
    status: Status
    row: Row | None = None
    detail: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
