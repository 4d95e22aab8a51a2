"""A softmax whose scores leave a bf16 matmul less a guess of their row's largest. Knows tensors only.

A bf16 matmul rounds its fp32 sums to bf16, too coarse for an exponent: a score of 40 would be off by 0.1. So
the guess is subtracted inside the sum, as one more product: the large scores, which carry the weight, come
out near 0 and nearly exact. Both matmuls are then bf16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from megatron_sps2.ops.tile import LN2, Tile

# bf16 matmuls take elements in pairs: one for the guess, one more that is 0.
NUM_GUESS_DIMS = 2
# The guess is the largest score of the first keys, which often outweigh all others, and of one in some.
NUM_FIRST_KEYS, NUM_STRIDED_KEYS = 32, 64
# Powers of two above the guess up to which a score is exact enough: bf16 rounds it by 2^-8 of that at most.
MAX_ABOVE = 6.0


class ShiftedSoftmax:
    """As ops.tile.Softmax, for bf16 q, k and values on CPU."""

    def __init__(self, q: Tensor, k: Tensor, values: Callable[[], Tensor], scale: float, room: int) -> None:
        self.q = q
        self.k = k.new_zeros(len(k), k.shape[1] + NUM_GUESS_DIMS)
        self.k[:, : k.shape[1]] = k
        self.k[:, k.shape[1]] = 1.0
        self.values = values
        self.scale = scale / LN2
        # Of a tile. Kept: fresh memory for each tile would miss the cache (a fifth of the time).
        self.rounded, self.scores = k.new_empty(room), k.new_empty(room, dtype=torch.float32)

    def block(self, queries: slice, seen: int, tiles: Iterable[Tile]) -> tuple[Tensor, Tensor]:
        q = self.q[queries].flatten(0, 1)
        rows = torch.cat((q, q.new_zeros(len(q), NUM_GUESS_DIMS)), dim=1)
        guess = rows[:, q.shape[1]]  # with its sign turned
        guess.copy_(-torch.mm(rows, self._sample(seen).t()).amax(dim=1))
        part, total = (q.new_zeros(len(q), size, dtype=torch.float32) for size in (q.shape[1], 1))
        for tile in tiles:
            own_part, own_total = part[tile.rows], total[tile.rows]
            scores = self._scores(rows[tile.rows], tile)
            if scores.amax() > MAX_ABOVE:
                shrink = _raise(guess[tile.rows], scores.amax(dim=1), self.scale)
                own_part *= shrink
                own_total *= shrink
                scores = self._scores(rows[tile.rows], tile)
            weights = scores.exp2_()
            own_total += weights.sum(dim=1, keepdim=True)
            rounded = self.rounded[: weights.numel()].view_as(weights).copy_(weights)
            own_part += torch.mm(rounded, self.values()[tile.keys])
        return part.div_(total), total.log2().sub_(guess.float().unsqueeze(1), alpha=self.scale).mul_(LN2)

    def _sample(self, seen: int) -> Tensor:
        """Of the first `seen` keys those that the guess is made of `[s, d + 2]`."""
        stride = max(NUM_FIRST_KEYS, seen // NUM_STRIDED_KEYS)
        return torch.cat((self.k[: min(NUM_FIRST_KEYS, seen)], self.k[NUM_FIRST_KEYS:seen:stride]))

    def _scores(self, rows: Tensor, tile: Tile) -> Tensor:
        """`[r, d + 2]` -> scores `[r, keys]` in fp32, as powers of two above the guess."""
        keys = self.k[tile.keys]
        shape = len(rows), len(keys)
        rounded, scores = (x[: shape[0] * shape[1]].view(shape) for x in (self.rounded, self.scores))
        torch.mm(rows, keys.t(), out=rounded)
        return tile.hide(scores.copy_(rounded).mul_(self.scale))


def _raise(guess: Tensor, above: Tensor, scale: float) -> Tensor:
    """Raise guesses `[r]`, their signs turned, by what lies above -> what old weights shrink by `[r, 1]`."""
    before = guess.float()
    guess.copy_(before - above.clamp_(min=0) / scale)
    return ((guess.float() - before) * scale).exp2_().unsqueeze(1)
