"""Decode by shipping queries: the KV cache never moves (method.md 2c).

Queries of the batch go to all sp ranks, each attends with its own shard, partials come home and are merged.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_sps2.attention.kv_cache import KVCache, SlotRun
from megatron_sps2.attention.window import NO_WINDOWS, Windows
from megatron_sps2.ops.attend import attend
from megatron_sps2.ops.merge import merge
from megatron_sps2.parallel.collectives import Wire, gather_tokens, return_partials, route_rows


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """One token of a decode batch: its request, where it is computed and where its K and V are kept."""

    request_id: int
    home: int
    kv_rank: int
    # False: all of the request's KV, this token's too, lies on `home`, and nothing travels.
    spread: bool = True
    position: int = 0  # of the token; read where layers have windows


@dataclass(slots=True, kw_only=True)
class DecodeStep:
    """Attention of one decode batch. Blocks were granted before.

    Rows are sorted by home rank, and at a home the local ones come before those that are spread over ranks.
    Creating it makes room in the cache for the rows that are kept on this rank, once for all layers.
    """

    cache: KVCache
    wire: Wire
    rows: list[DecodeRow]
    scale: float
    windows: Windows = NO_WINDOWS
    _local: _Rows = field(init=False)
    _spread: _Rows = field(init=False)

    def __post_init__(self) -> None:
        order = [(row.home, row.spread) for row in self.rows]
        assert order == sorted(order), f"decode rows are not sorted by home rank, local ones first: {order}"
        me = self.wire.axis.rank
        local = [row for row in self.rows if not row.spread and row.home == me]
        assert all(row.kv_rank == me for row in local), "a local row keeps its KV at home"
        self._local = _Rows.make_room(self.cache, local, me, self.windows)
        # Rows kept here arrive sorted by home rank, which is the order of `rows`.
        self._spread = _Rows.make_room(self.cache, [row for row in self.rows if row.spread], me, self.windows)

    @property
    def home_counts(self) -> list[int]:
        """Rows at home on each sp rank."""
        return _count_homes(self.rows, self.wire.axis.size)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [b/P, 1, n, d], k and v [b/P, 1, n_kv, d] of the rows at home here -> [b/P, 1, n, d]."""
        num_local = len(self._local.rows)
        queries = None
        if self._spread.rows:
            counts = _count_homes(self._spread.rows, self.wire.axis.size)
            queries = gather_tokens(q[num_local:, 0], self.wire, counts, "gather_queries")
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if num_local:
            self.cache.write(layer, self._local.kept, k[:num_local, 0], v[:num_local, 0])
            out[:num_local, 0] = self._attend_shards(layer, q[:num_local, 0], self._local)[0]
        if queries is not None:
            kept = self._take_kv(k[num_local:, 0], v[num_local:, 0])
            self.cache.write(layer, self._spread.kept, *kept)
            part, lse = self._attend_shards(layer, queries.wait(), self._spread)
            outs, lses = return_partials(part, lse, self.wire, counts).wait()
            out[num_local:, 0] = merge(outs, lses)[0]
        return out

    def _take_kv(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of the spread rows at home here -> of those kept here; nothing travels if all stay."""
        rows = self._spread.rows
        if all(row.home == row.kv_rank for row in rows):
            return k, v
        me, ranks = self.wire.axis.rank, range(self.wire.axis.size)
        mine = [row.kv_rank for row in rows if row.home == me]
        order = sorted(range(len(mine)), key=lambda i: mine[i])
        sent = [mine.count(rank) for rank in ranks]
        received = [sum(row.home == rank and row.kv_rank == me for row in rows) for rank in ranks]
        both = torch.stack([k, v], dim=1)[order]  # [b/P, 2, n_kv, d], rows for rank 0 first
        k, v = route_rows(both, self.wire, sent, received, "move_new_kv").wait().unbind(dim=1)
        return k, v

    def _attend_shards(self, layer: int, queries: Tensor, rows: _Rows) -> tuple[Tensor, Tensor]:
        """[b, n, d] -> this rank's part: out [b, n, d], lse [b, n] fp32; row by row, as shards are ragged."""
        shards = rows.near if layer in self.windows.layers else rows.shards
        out = torch.zeros_like(queries)
        lse = queries.new_full(queries.shape[:2], float("-inf"), dtype=torch.float32)
        for i, runs in enumerate(shards):
            if not runs:
                continue
            k, v = self.cache.read(layer, runs)
            row_out, row_lse = attend(queries[i : i + 1, None], k, v, scale=self.scale, diagonal=None)
            out[i], lse[i] = row_out[0, 0], row_lse[0, 0]
        return out, lse


@dataclass(frozen=True, slots=True)
class _Rows:
    """Some rows, where their new K and V go on this rank, and what of each request lies here."""

    rows: list[DecodeRow]
    kept: list[SlotRun]
    shards: list[list[SlotRun]]
    near: list[list[SlotRun]]  # within the window

    @classmethod
    def make_room(cls, cache: KVCache, rows: list[DecodeRow], me: int, windows: Windows) -> _Rows:
        mine = [row for row in rows if row.kv_rank == me]
        kept = [
            run
            for row in mine
            for run in cache.extend(row.request_id, 1, [row.position] if windows.layers else ())
        ]
        shards = [cache.runs(row.request_id, 0, cache.num_tokens(row.request_id)) for row in rows]
        near = [
            cache.runs_after(row.request_id, row.position - windows.size)[0] if windows.layers else []
            for row in rows
        ]
        return cls(rows, kept, shards, near)


def _count_homes(rows: list[DecodeRow], num_ranks: int) -> list[int]:
    homes = [row.home for row in rows]
    return [homes.count(rank) for rank in range(num_ranks)]
