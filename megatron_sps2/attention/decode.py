"""Decode by shipping queries: the KV cache never moves (method.md 2c).

Queries of the batch go to all sp ranks, each attends with its own shard, partials come home and are merged.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_sps2.attention.kv_cache import KVCache, SlotRun
from megatron_sps2.ops.attend import attend
from megatron_sps2.ops.merge import merge
from megatron_sps2.parallel.collectives import Wire, gather_tokens, return_partials, route_rows


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One token of a decode batch: its request, where it is computed and where its K and V are kept."""

    request_id: int
    home: int
    kv_rank: int


@dataclass(slots=True, kw_only=True)
class DecodeStep:
    """Attention of one decode batch. Rows are sorted by home rank; blocks were granted before.

    Creating it makes room in the cache for the rows that are kept on this rank, once for all layers.
    """

    cache: KVCache
    wire: Wire
    rows: list[DecodeRow]
    scale: float
    _kept: list[SlotRun] = field(init=False, default_factory=list)
    _shards: list[list[SlotRun]] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        homes = [row.home for row in self.rows]
        assert homes == sorted(homes), f"decode rows are not sorted by home rank: {homes}"
        me = self.wire.axis.rank
        # Rows kept here arrive sorted by home rank, which is the order of `rows`.
        self._kept = [
            run for row in self.rows if row.kv_rank == me for run in self.cache.extend(row.request_id, 1)
        ]
        self._shards = [
            self.cache.runs(row.request_id, 0, self.cache.num_tokens(row.request_id)) for row in self.rows
        ]

    @property
    def home_counts(self) -> list[int]:
        """Rows at home on each sp rank."""
        homes = [row.home for row in self.rows]
        return [homes.count(rank) for rank in range(self.wire.axis.size)]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [b/P, 1, n, d], k and v [b/P, 1, n_kv, d] of the rows at home here -> [b/P, 1, n, d]."""
        counts = self.home_counts
        queries = gather_tokens(q[:, 0], self.wire, counts, "gather_queries")
        self.cache.write(layer, self._kept, *self._take_kv(k[:, 0], v[:, 0]))
        out, lse = self._attend_shards(layer, queries.wait())
        outs, lses = return_partials(out, lse, self.wire, counts).wait()
        return merge(outs, lses)[0].unsqueeze(1)

    def _take_kv(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of the rows at home here -> of the rows kept here; nothing travels if they are the same."""
        if all(row.home == row.kv_rank for row in self.rows):
            return k, v
        me, ranks = self.wire.axis.rank, range(self.wire.axis.size)
        mine = [row.kv_rank for row in self.rows if row.home == me]
        order = sorted(range(len(mine)), key=lambda i: mine[i])
        sent = [mine.count(rank) for rank in ranks]
        received = [sum(row.home == rank and row.kv_rank == me for row in self.rows) for rank in ranks]
        both = torch.stack([k, v], dim=1)[order]  # [b/P, 2, n_kv, d], rows for rank 0 first
        k, v = route_rows(both, self.wire, sent, received, "move_new_kv").wait().unbind(dim=1)
        return k, v

    def _attend_shards(self, layer: int, queries: Tensor) -> tuple[Tensor, Tensor]:
        """[b, n, d] -> this rank's part: out [b, n, d], lse [b, n] fp32; row by row, as shards are ragged."""
        out = torch.zeros_like(queries)
        lse = queries.new_full(queries.shape[:2], float("-inf"), dtype=torch.float32)
        for i, runs in enumerate(self._shards):
            if not runs:
                continue
            k, v = self.cache.read(layer, runs)
            row_out, row_lse = attend(queries[i : i + 1, None], k, v, scale=self.scale, diagonal=None)
            out[i], lse[i] = row_out[0, 0], row_lse[0, 0]
        return out, lse
