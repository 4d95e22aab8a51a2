"""Decode by shipping queries: the KV cache never moves (method.md 2c).

Queries of the batch go to all sp ranks, each attends with its own shard, partials come home and are merged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_sps2.attention.kv_cache import KVCache
from megatron_sps2.attention.rotations import RotationOf, no_rotation
from megatron_sps2.attention.window import NO_WINDOWS, Windows
from megatron_sps2.ops.kernel_set import TORCH, Kernels
from megatron_sps2.ops.paged import NO_SLOT, PagedRows, Slots
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


class RowHere(NamedTuple):
    """One rank's part in a row: the slot of its new K and V, or NO_SLOT, and which tokens it attends to."""

    slot: int
    blocks: list[int]
    first_near: int  # of the tokens within the window
    num_tokens: int


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
    kernels: Kernels = TORCH
    rotation_of: RotationOf = no_rotation
    _local: _Rows = field(init=False)
    _spread: _Rows = field(init=False)
    # Where new K and V travel, if any do.
    _moves: _Moves | None = field(init=False)
    # Of the rows at home here, where what stays goes; NO_SLOT for what travels. Made where a layer asks.
    _home_slots: Tensor | None = field(init=False, default=None)
    # int64: `_moves.order`, made where a layer asks, too.
    _order: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        order = [(row.home, row.spread) for row in self.rows]
        assert order == sorted(order), f"decode rows are not sorted by home rank, local ones first: {order}"
        me = self.wire.axis.rank
        local = [row for row in self.rows if not row.spread and row.home == me]
        assert all(row.kv_rank == me for row in local), "a local row keeps its KV at home"
        self._local = _Rows.make_room(self.cache, local, me, self.windows)
        # Rows kept here arrive sorted by home rank, which is the order of `rows`.
        self._spread = _Rows.make_room(self.cache, [row for row in self.rows if row.spread], me, self.windows)
        self._moves = _Moves.of(self._spread.rows, me, self.wire.axis.size)

    @property
    def home_counts(self) -> list[int]:
        """Rows at home on each sp rank."""
        return _count_homes(self.rows, self.wire.axis.size)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [b/P, 1, n, d], k and v [b/P, 1, n_kv, d] of the rows at home here -> [b/P, 1, n, d]."""
        num_local = len(self._local.rows)
        v = v[:, 0]
        q, k = self._keep(layer, q[:, 0], k[:, 0], v)
        queries = None
        if self._spread.rows:
            counts = _count_homes(self._spread.rows, self.wire.axis.size)
            queries = gather_tokens(q[num_local:], self.wire, counts, "gather_queries")
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if num_local:
            out[:num_local] = self._attend_shards(layer, q[:num_local], self._local)[0]
        if queries is not None:
            if self._moves is not None:
                taken = self._take_kv(self._moves, k[num_local:], v[num_local:])
                self.kernels.write_paged(self.cache.layer(layer), self._spread.kept, *taken)
            part, lse = self._attend_shards(layer, queries.wait(), self._spread)
            outs, lses = return_partials(part, lse, self.wire, counts).wait()
            out[num_local:] = self.kernels.merge(outs, lses)[0]
        return out.unsqueeze(1)

    def here(self) -> list[RowHere]:
        """What this rank has of every row's request."""
        local, spread = self._local.here(self.wire.axis.rank), self._spread.here(self.wire.axis.rank)
        nothing = RowHere(NO_SLOT, [], 0, 0)
        return [
            next(spread if row.spread else local)
            if row.spread or row.home == self.wire.axis.rank
            else nothing
            for row in self.rows
        ]

    def _find_home_slots(self) -> list[int]:
        num_spread = sum(row.home == self.wire.axis.rank for row in self._spread.rows)
        spread = self._spread.kept.numbers if self._moves is None else [NO_SLOT] * num_spread
        return [*self._local.kept.numbers, *spread]

    def _keep(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes the K and V that stay at home -> q and k, turned where Megatron has not."""
        kv = self.cache.layer(layer)
        if self.kernels.append_roped is not None:
            if self._home_slots is None:
                slots = self._find_home_slots()
                self._home_slots = torch.tensor(slots, dtype=torch.int64, device=self.cache.device)
            return self.kernels.append_roped(q, k, v, self.rotation_of(layer), kv, self._home_slots)
        num_local = len(self._local.rows)
        self.kernels.write_paged(kv, self._local.kept, k[:num_local], v[:num_local])
        if self._moves is None:
            self.kernels.write_paged(kv, self._spread.kept, k[num_local:], v[num_local:])
        return q, k

    def _take_kv(self, moves: _Moves, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """K and V of the spread rows at home here -> of those kept here."""
        both = torch.stack([k, v], dim=1)  # [b/P, 2, n_kv, d]
        if moves.order is not None:
            if self._order is None:
                self._order = torch.tensor(moves.order, device=both.device)
            both = both.index_select(0, self._order)
        k, v = route_rows(both, self.wire, moves.sent, moves.received, "move_new_kv").wait().unbind(dim=1)
        return k, v

    def _attend_shards(self, layer: int, queries: Tensor, rows: _Rows) -> tuple[Tensor, Tensor]:
        """[b, n, d] -> this rank's part: out [b, n, d], lse [b, n] fp32."""
        shards = rows.near if layer in self.windows.layers else rows.shards
        return self.kernels.attend_paged(queries, self.cache.layer(layer), shards, scale=self.scale)


@dataclass(frozen=True, slots=True)
class _Rows:
    """Some rows, where their new K and V go on this rank, and what of each request lies here."""

    rows: list[DecodeRow]
    kept: Slots
    shards: PagedRows
    near: PagedRows  # within the window

    @classmethod
    def make_room(cls, cache: KVCache, rows: list[DecodeRow], me: int, windows: Windows) -> _Rows:
        mine = [row for row in rows if row.kv_rank == me]
        kept = [
            run
            for row in mine
            for run in cache.extend(row.request_id, 1, [row.position] if windows.layers else ())
        ]
        ids = [row.request_id for row in rows]
        shards = near = cache.rows(ids, [0] * len(ids))
        if windows.layers:
            firsts = [cache.first_after(row.request_id, row.position - windows.size) for row in rows]
            near = cache.rows(ids, firsts)
        return cls(rows, Slots(kept), shards, near)

    def here(self, me: int) -> Iterator[RowHere]:
        slots = iter(self.kept.numbers)
        for row, blocks, first, stop in zip(
            self.rows, self.shards.tables, self.near.starts, self.shards.stops, strict=True
        ):
            yield RowHere(next(slots) if row.kv_rank == me else NO_SLOT, blocks, first, stop)


@dataclass(frozen=True, slots=True)
class _Moves:
    """How new K and V get from the rows' homes to where they are kept: the same in every layer."""

    order: list[int] | None  # of the rows at home here, those for rank 0 first; None: as they are
    sent: list[int]  # rows to each rank
    received: list[int]

    @classmethod
    def of(cls, rows: list[DecodeRow], me: int, num_ranks: int) -> _Moves | None:
        """None where every row is kept at home."""
        if all(row.home == row.kv_rank for row in rows):
            return None
        mine = [row.kv_rank for row in rows if row.home == me]
        order = sorted(range(len(mine)), key=lambda i: mine[i])
        return cls(
            order=None if order == list(range(len(mine))) else order,
            sent=[mine.count(rank) for rank in range(num_ranks)],
            received=_count_homes([row for row in rows if row.kv_rank == me], num_ranks),
        )


def _count_homes(rows: list[DecodeRow], num_ranks: int) -> list[int]:
    homes = [row.home for row in rows]
    return [homes.count(rank) for rank in range(num_ranks)]
