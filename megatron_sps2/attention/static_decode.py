"""A decode batch of a fixed number of rows whose numbers lie in tensors: what a recorded step can run again.

Nothing in it depends on the host, sizes of messages included, so that a CUDA graph of it is right for any
requests.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sps2.attention.decode import RowHere
from megatron_sps2.attention.kv_cache import KVCache
from megatron_sps2.attention.rotations import RotationOf
from megatron_sps2.ops.kernel_set import Kernels
from megatron_sps2.ops.paged import NO_SLOT, SlotRun, slot_runs
from megatron_sps2.parallel.collectives import Wire, gather_tokens, return_partials


@dataclass(frozen=True, slots=True)
class StaticRows:
    """As ops.paged.PagedRows, from tensors: int32 tables [b, m], starts [b], stops [b]."""

    tables: Tensor
    starts: Tensor
    stops: Tensor
    block_size: int

    def __len__(self) -> int:
        return len(self.tables)

    @property
    def max_tokens(self) -> int:
        """Of any request: the grid of a recorded kernel must do for all."""
        return self.tables.shape[1] * self.block_size

    @property
    def runs(self) -> list[list[SlotRun]]:
        """Reads the tensors: not for recorded steps."""
        rows = zip(self.tables.tolist(), self.starts.tolist(), self.stops.tolist(), strict=True)
        return [slot_runs(*row, self.block_size) for row in rows]

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        return self.tables, self.starts, self.stops


@dataclass(slots=True, kw_only=True)
class StaticDecodeStep:
    """Attention of a batch with equally many rows, b, at home on each of P ranks.

    Unlike DecodeStep, all that a row's home knows goes to all ranks in one message: its query, and its new K
    and V for the rank that keeps them. A row that need not travel does so, too.
    """

    cache: KVCache
    wire: Wire
    kernels: Kernels
    scale: float
    rotation_of: RotationOf
    slots: Tensor  # int64 [P * b]: where K and V of every rank's rows go, or NO_SLOT
    shards: StaticRows  # of every rank's rows, what lies here
    near: StaticRows  # of windowed layers
    window_layers: frozenset[int]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [b, 1, n, d], k and v [b, 1, n_kv, d] of the rows here, not turned -> [b, 1, n, d]."""
        append, rotation = self.kernels.append_roped, self.rotation_of(layer)
        assert append is not None, "only kernels that append by slot can be recorded"
        kv, rows = self.cache.layer(layer), self.near if layer in self.window_layers else self.shards
        q, k, v = q[:, 0], k[:, 0], v[:, 0]
        if self.wire.axis.size == 1:
            q, _ = append(q, k, v, rotation, kv, self.slots)
            return self.kernels.attend_paged(q, kv, rows, scale=self.scale)[0].unsqueeze(1)
        counts = [len(q)] * self.wire.axis.size
        q, k = append(q, k, v, rotation, kv, torch.full_like(self.slots[: len(q)], NO_SLOT))
        mine = torch.cat([q, k, v], dim=1)  # [b, n + 2 n_kv, d]
        everybody = gather_tokens(mine, self.wire, counts, "gather_rows").wait()  # [P * b, ...]
        q, k, v = everybody.split([x.shape[1] for x in (q, k, v)], dim=1)
        append(q, k, v, None, kv, self.slots)
        part, lse = self.kernels.attend_paged(q, kv, rows, scale=self.scale)  # [P * b, n, d], [P * b, n]
        outs, lses = return_partials(part, lse, self.wire, counts).wait()
        return self.kernels.merge(outs, lses)[0].unsqueeze(1)


class StaticBatch:
    """The tensors of up to `rows_per_rank` rows at home on each of `num_ranks` ranks.

    A row that no request uses attends to nothing and keeps nothing.
    """

    def __init__(
        self, num_ranks: int, rows_per_rank: int, max_blocks: int, block_size: int, device: torch.device
    ) -> None:
        self._num_ranks, self._block_size, pinned = num_ranks, block_size, device.type == "cuda"
        num_rows = num_ranks * rows_per_rank
        # Token ids and positions of the rows here; of all ranks' rows slots, stops, and starts of near ones.
        self._numbers = torch.zeros(5, num_rows, dtype=torch.int64, device=device)
        self._tables = torch.zeros(num_rows, max_blocks, dtype=torch.int32, device=device)
        self._host_numbers = torch.zeros(5, num_rows, dtype=torch.int64, pin_memory=pinned)
        self._host_tables = torch.zeros(num_rows, max_blocks, dtype=torch.int32, pin_memory=pinned)
        # By row the request's list of blocks, which only grows, and how many of them have been sent.
        self._sent: list[tuple[list[int], int]] = [([], 0)] * num_rows
        self.fill(rows_per_rank, [], [], [[] for _ in range(num_ranks)])

    def fill(
        self, rows_per_rank: int, token_ids: list[int], positions: list[int], rows: list[list[RowHere]]
    ) -> None:
        """Sends a step's numbers to the device, for `rows_per_rank` rows a rank.

        Token ids and positions of the rows at home here; `rows` of every rank. The step before must have
        ended: its tokens were read.
        """
        host = self._host_numbers.zero_()
        host[2] = NO_SLOT
        host[:2, : len(token_ids)] = torch.tensor([token_ids, positions])
        changed = False
        for rank, mine in enumerate(rows):
            first, last = rank * rows_per_rank, rank * rows_per_rank + len(mine)
            host[2:, first:last] = (
                torch.tensor([[row.slot, row.num_tokens, row.first_near] for row in mine], dtype=torch.int64)
                .view(-1, 3)
                .T
            )
            changed |= self._fill_tables(first, [row.blocks for row in mine])
        if changed:
            self._tables.copy_(self._host_tables, non_blocking=True)
        self._send()

    def inputs(self, rows_per_rank: int) -> tuple[Tensor, Tensor]:
        """Token ids [b, 1] and positions [b] of the rows here."""
        return self._numbers[0, :rows_per_rank, None], self._numbers[1, :rows_per_rank]

    def rows(self, rows_per_rank: int) -> tuple[Tensor, StaticRows, StaticRows]:
        """Slots of all ranks' rows, what they attend to here, and what of it lies within the window."""
        num_rows = self._num_ranks * rows_per_rank
        stops, near_starts = self._numbers[3:5, :num_rows].to(torch.int32)
        tables = self._tables[:num_rows]
        shards = StaticRows(tables, torch.zeros_like(stops), stops, self._block_size)
        near = StaticRows(tables, near_starts, stops, self._block_size)
        return self._numbers[2, :num_rows], shards, near

    def _send(self) -> None:
        self._numbers.copy_(self._host_numbers, non_blocking=True)

    def _fill_tables(self, first: int, tables: list[list[int]]) -> bool:
        """Of rows from `first` on. Whether anything is new: a row's request, or a block of it."""
        changed = False
        for row, table in enumerate(tables, first):
            known, count = self._sent[row]
            start = count if known is table else 0
            if start < len(table):
                self._host_tables[row, start : len(table)] = torch.tensor(table[start:], dtype=torch.int32)
                changed = True
            self._sent[row] = table, len(table)
        return changed
