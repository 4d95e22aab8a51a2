"""Prefill attention in tiles of rows x keys, one KV head at a time. Knows no rank.

The query heads that share a KV head are rows of one matmul. What is done with a tile's scores is a softmax's
business: `running` in fp32, `shifted` where bf16 matmuls are fast.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sps2.ops.product import fast_bf16
from megatron_sps2.ops.running import RunningSoftmax
from megatron_sps2.ops.shifted import ShiftedSoftmax
from megatron_sps2.ops.tile import Softmax, Tile

# Tuned on one Zen 4 core: smaller tiles stay in L2 but pay more for each call than they win.
TILE_ROWS = 1024
TILE_KEYS = 1024
MAX_QUERIES = 512
# Where some queries see a key and others do not, half of a tile is masked away: it is cut into strips.
STRIP_QUERIES = 256
# From here on bf16 scores gain more than their guess costs.
MANY_KEYS = 2048


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
    softmax = choose_softmax(q, k)
    cut = _Cut(len(q) - blind, group, len(k), None if diagonal is None else diagonal + blind)
    mask = cut.edge_mask().to(q.device)
    for entry, head in itertools.product(range(q.shape[1]), range(k.shape[2])):
        place = slice(blind, None), entry, slice(head * group, (head + 1) * group)
        if len(k) and blind < len(q):
            values = functools.cache(lambda e=entry, h=head: _as_values(arrive()[:, e, h]))
            shared = softmax(q[place], k[:, entry, head], values, scale, TILE_ROWS * TILE_KEYS)
            for block in cut.blocks():
                part, row_lse = shared.block(block, cut.num_seen(block), cut.tiles(block, mask))
                out[place][block] = part.unflatten(0, (-1, group))
                lse[place][block] = row_lse.view(-1, group)
    arrive()  # where nothing was seen too: whoever sends the values counts on the call
    return out, lse


def choose_softmax(q: Tensor, k: Tensor) -> type[Softmax]:
    """The one for this dtype, device and number of keys."""
    shifted = q.device.type == "cpu" and fast_bf16(q) and len(k) >= MANY_KEYS
    return ShiftedSoftmax if shifted else RunningSoftmax


def _as_values(v: Tensor) -> Tensor:
    """Contiguous, and in bf16 only where that is fast: elsewhere fp32 costs no more and is nearer."""
    return v.to(v.dtype if fast_bf16(v) else torch.float32).contiguous()


@dataclass(frozen=True, slots=True)
class _Cut:
    """How queries of `group` heads, each of which sees a key, and keys are cut into blocks and tiles."""

    num_queries: int
    group: int
    num_keys: int
    diagonal: int | None

    def blocks(self) -> Iterator[slice]:
        size = max(1, min(MAX_QUERIES, TILE_ROWS // self.group))
        return (slice(low, min(low + size, self.num_queries)) for low in range(0, self.num_queries, size))

    def num_seen(self, block: slice) -> int:
        """The first keys, those that all queries of a block see: one at least."""
        return self.num_keys if self.diagonal is None else min(self.num_keys, block.start + self.diagonal + 1)

    def tiles(self, block: slice, mask: Tensor) -> Iterator[Tile]:
        """Those of all queries of a block; then strips of queries and the keys that some of them see."""
        size, past = block.stop - block.start, self.num_keys
        if self.diagonal is not None:
            past = min(past, block.start + self.diagonal)
        for low in range(0, past, TILE_KEYS):
            yield Tile(rows=slice(0, size * self.group), keys=slice(low, min(low + TILE_KEYS, past)))
        for first in range(0, size if past < self.num_keys else 0, STRIP_QUERIES):
            # The i-th query of the block sees i + 1 of these keys; the strip's queries all see the first.
            stop = min(first + STRIP_QUERIES, size)
            num_keys = min(stop, self.num_keys - past)
            rows = slice(first * self.group, stop * self.group)
            hidden = mask[: rows.stop - rows.start, : max(0, num_keys - first)]
            yield Tile(rows=rows, keys=slice(past, past + num_keys), mask=hidden, edge=min(first, num_keys))

    def edge_mask(self) -> Tensor:
        """For a strip's scores `[queries * g, keys]`: -inf where key t > query i, else 0."""
        size = min(self.num_queries, STRIP_QUERIES)
        hidden = torch.ones(size, size, dtype=torch.bool).triu_(1)
        mask = torch.zeros(size, size).masked_fill_(hidden, -torch.inf)
        return mask.repeat_interleave(self.group, dim=0)
