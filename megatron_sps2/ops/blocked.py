"""Prefill attention in tiles of rows x keys with a running softmax, one KV head at a time. Knows no rank.

Scores are fp32 whatever the inputs: rounding them to bf16 would cost several times the error of bf16 itself.
The query heads that share a KV head are rows of one matmul.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Tuned on one Zen 5 core: smaller tiles stay in L2 but pay more for each call than they win.
TILE_ROWS = 384
TILE_KEYS = 2048
# Rows of one diagonal tile see half of it: more queries in a block would waste more on the mask.
MAX_QUERIES = 256
LN2 = math.log(2.0)


def attend_blocked(
    q: Tensor, k: Tensor, v: Tensor | Callable[[], Tensor], *, scale: float, diagonal: int | None
) -> tuple[Tensor, Tensor]:
    """As `ops.attend.attend`: q `[sq, b, n, d]` -> out, lse `[sq, b, n]`. Holds one tile of scores."""
    group = q.shape[2] // k.shape[2]
    # Freed at once, never touched: then glibc keeps blocks of a tile's size. Otherwise it maps them and
    # faults in their pages at every tile (a fifth of the time at 2K tokens).
    q.new_empty(4 * TILE_ROWS * TILE_KEYS, dtype=torch.float32)
    out, lse = q.new_zeros(q.shape), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    # Queries i < -diagonal see no key: their zeros and -inf stand as they are.
    blind = 0 if diagonal is None else min(len(q), max(0, -diagonal))
    arrive = functools.cache(lambda: v if isinstance(v, Tensor) else v())
    for entry, head in itertools.product(range(q.shape[1]), range(k.shape[2])):
        place = slice(blind, None), entry, slice(head * group, (head + 1) * group)
        if len(k) and blind < len(q):
            shared = _Group(
                q=(q[place].float() * (scale / LN2)).contiguous(),
                k=k[:, entry, head].float().contiguous(),
                values=functools.cache(lambda e=entry, h=head: _as_values(arrive()[:, e, h])),
                diagonal=None if diagonal is None else diagonal + blind,
            )
            shared.attend(out[place], lse[place])
    arrive()  # where nothing was seen too: whoever sends the values counts on the call
    return out, lse


@dataclass(frozen=True, slots=True)
class _Group:
    """One KV head and the query heads that read it; every query sees at least one key.

    q `[sq, g, d]` fp32, scaled so that weights are powers of two; k `[sk, d]` fp32; values() `[sk, d]`.
    """

    q: Tensor
    k: Tensor
    values: Callable[[], Tensor]
    diagonal: int | None

    def attend(self, out: Tensor, lse: Tensor) -> None:
        """Fill out `[sq, g, d]` and lse `[sq, g]`."""
        size = max(1, min(MAX_QUERIES, TILE_ROWS // self.q.shape[1]))
        mask = self._edge_mask(size)
        for start in range(0, len(self.q), size):
            block = slice(start, min(start + size, len(self.q)))
            part, row_lse = self._running_softmax(self._tiles(block, mask))
            out[block], lse[block] = part.view_as(out[block]), row_lse.view_as(lse[block])

    def _edge_mask(self, size: int) -> Tensor:
        """`[size * g, size]` for scores: query i does not see the t-th key past those all see if t >= i."""
        above = torch.ones(size, size, dtype=torch.bool, device=self.q.device).triu_()
        mask = torch.zeros(size, size, device=self.q.device).masked_fill_(above, -torch.inf)
        return mask.repeat_interleave(self.q.shape[1], dim=0)

    def _tiles(self, block: slice, mask: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Keys that a block sees and their scores `[rows, keys]`; in the first tile each row sees one."""
        rows = self.q[block].flatten(0, 1)
        # Keys before `seen` are seen by every row, keys from `end` on by none.
        seen = end = len(self.k)
        if self.diagonal is not None:
            seen, end = min(seen, block.start + self.diagonal + 1), min(end, block.stop + self.diagonal)
        cuts = [*range(0, seen, TILE_KEYS), end]
        for low, high in reversed([*itertools.pairwise(cuts)]):
            scores = product(rows, self.k[low:high].t())
            if high > seen:
                scores[:, seen - low :] += mask[: len(rows), : high - seen]
            yield slice(low, high), scores

    def _running_softmax(self, tiles: Iterator[tuple[slice, Tensor]]) -> tuple[Tensor, Tensor]:
        """Scores tile by tile -> out `[rows, d]` fp32, lse `[rows, 1]` in natural logarithms."""
        keys, scores = next(tiles)
        top = scores.amax(dim=1, keepdim=True)
        part, total = self._weigh(keys, scores, top)
        for keys, scores in tiles:
            before, top = top, torch.maximum(top, scores.amax(dim=1, keepdim=True))
            more_part, more_total = self._weigh(keys, scores, top)
            shrink = (before - top).exp2_()
            part.mul_(shrink).add_(more_part)
            total.mul_(shrink).add_(more_total)
        return part.div_(total), total.log2().add_(top).mul_(LN2)

    def _weigh(self, keys: slice, scores: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
        """Scores `[rows, keys]`, overwritten -> sums of weight x value `[rows, d]`, weights `[rows, 1]`."""
        weights = scores.sub_(top).exp2_()
        values = self.values()[keys]
        total = weights.sum(dim=1, keepdim=True)
        if values.dtype == torch.float32:
            return product(weights, values), total
        return torch.mm(weights.to(values.dtype), values).float(), total


def _as_values(v: Tensor) -> Tensor:
    """Contiguous, and in bf16 only where that is fast: elsewhere fp32 costs no more and is nearer."""
    return v.to(v.dtype if fast_bf16(v) else torch.float32).contiguous()


def fast_bf16(x: Tensor) -> bool:
    """Whether bf16 matmuls of x beat fp32 ones."""
    return x.dtype == torch.bfloat16 and (x.is_cuda or torch.cpu._is_avx512_bf16_supported())


def product(x: Tensor, y: Tensor) -> Tensor:
    """fp32 x `[m, k]` times y `[k, n]`. On CPU oneDNN's linear layer is about twice as fast as torch.mm."""
    if x.device.type == "cpu" and torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, y.t(), None, "none", [], "")
    return torch.mm(x, y)
