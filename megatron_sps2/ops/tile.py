"""A tile of prefill's scores, rows x keys, and what takes tiles one after another. Knows tensors only."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

# Weights are powers of two: exp2 is faster than exp.
LN2 = math.log(2.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """Rows of a block of queries, counted from its first, and the keys that they meet."""

    rows: slice
    keys: slice
    # What is added to the scores of the keys from `edge` on: 0 or, where a row does not see a key, -inf.
    mask: Tensor | None = None
    edge: int = 0

    def hide(self, scores: Tensor) -> Tensor:
        """Scores `[rows, keys]`, changed in place: those not seen are -inf."""
        if self.mask is not None:
            scores[:, self.edge :].add_(self.mask)
        return scores


class Softmax(Protocol):
    """Attention of one KV head: q `[sq, g, d]`, k, values() `[sk, d]`; tiles of up to `room` scores."""

    def __init__(
        self, q: Tensor, k: Tensor, values: Callable[[], Tensor], scale: float, room: int
    ) -> None: ...

    def block(self, queries: slice, seen: int, tiles: Iterable[Tile]) -> tuple[Tensor, Tensor]:
        """-> out `[rows, d]` fp32, lse `[rows, 1]` in natural logarithms; rows are queries x g.

        Every row sees the first `seen` keys, one at least, and a key of the first tile that has the row.
        """
        ...
