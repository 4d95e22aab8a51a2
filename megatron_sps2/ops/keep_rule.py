"""What a reader keeps of earlier segments besides what its probes say: sinks, a window and a budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

RuleKind = Literal["none", "strided", "floor", "best"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepRule:
    """For the KV heads of one call. Sinks and the window are kept whatever the kind; what is kept besides:

    none: nothing. strided: every budget-th key, staggered by head. floor: the fewest keys that leave each
    segment's part of 1 - budget at most. best: the budget-th best and all that are not worse.
    """

    kind: RuleKind
    num_sinks: int  # first tokens of the sequence
    window: int  # tokens just before the reader
    # float64 [n_kv, levels], or [n_kv, 1] for all levels alike; a best budget counts keys of a segment.
    budgets: Tensor
    first_head: int = 0  # which head of the model is the first one here: strides are staggered by it

    def of(self, head: int, levels: tuple[int, ...]) -> list[float]:
        """Budgets of one head by level, on the host."""
        row = self.budgets[head].tolist()
        return [row[level if len(row) > 1 else 0] for level in levels]
