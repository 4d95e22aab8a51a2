"""A running softmax with fp32 scores, whatever the inputs, on any device. Knows tensors only."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from megatron_sps2.ops.product import product
from megatron_sps2.ops.tile import LN2, Tile


class RunningSoftmax:
    """As ops.tile.Softmax. Each row's largest score so far is the reference of its weights."""

    def __init__(self, q: Tensor, k: Tensor, values: Callable[[], Tensor], scale: float, room: int) -> None:
        self.q = (q.float() * (scale / LN2)).contiguous()
        self.k = k.float().contiguous()
        self.values = values

    def block(self, queries: slice, seen: int, tiles: Iterable[Tile]) -> tuple[Tensor, Tensor]:
        rows = self.q[queries].flatten(0, 1)
        top = rows.new_full((len(rows), 1), -torch.inf)
        part, total = torch.zeros_like(rows), torch.zeros_like(top)
        for tile in tiles:
            scores = tile.hide(product(rows[tile.rows], self.k[tile.keys].t()))
            own_top, own_part, own_total = (x[tile.rows] for x in (top, part, total))
            before = own_top.clone()
            torch.maximum(before, scores.amax(dim=1, keepdim=True), out=own_top)
            weights = scores.sub_(own_top).exp2_()
            shrink = before.sub_(own_top).exp2_()
            own_part.mul_(shrink).add_(_weigh(weights, self.values()[tile.keys]))
            own_total.mul_(shrink).add_(weights.sum(dim=1, keepdim=True))
        return part.div_(total), total.log2().add_(top).mul_(LN2)


def _weigh(weights: Tensor, values: Tensor) -> Tensor:
    """fp32 weights `[rows, keys]` x values `[keys, d]` -> `[rows, d]` fp32."""
    if values.dtype == torch.float32:
        return product(weights, values)
    return torch.mm(weights.to(values.dtype), values).float()
