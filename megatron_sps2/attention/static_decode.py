"""A decode batch of a fixed number of rows whose numbers lie in tensors: what a recorded step can run again.

For a world of one rank: every row is at home here. Nothing in it depends on the host, so that a CUDA graph of
it is right for any requests.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sps2.attention.decode import DecodeStep
from megatron_sps2.attention.kv_cache import KVCache
from megatron_sps2.attention.rotations import RotationOf
from megatron_sps2.ops.kernel_set import Kernels
from megatron_sps2.ops.paged import NO_SLOT, SlotRun, slot_runs


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
    """Attention of a batch whose K and V go to `slots` int64 [b]."""

    cache: KVCache
    kernels: Kernels
    scale: float
    rotation_of: RotationOf
    slots: Tensor
    shards: StaticRows
    near: StaticRows  # of windowed layers
    window_layers: frozenset[int]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [b, 1, n, d], k and v [b, 1, n_kv, d], not turned -> [b, 1, n, d]."""
        assert self.kernels.append_roped is not None, "only kernels that append by slot can be recorded"
        kv, rows = self.cache.layer(layer), self.near if layer in self.window_layers else self.shards
        q, _ = self.kernels.append_roped(q[:, 0], k[:, 0], v[:, 0], self.rotation_of(layer), kv, self.slots)
        return self.kernels.attend_paged(q, kv, rows, scale=self.scale)[0].unsqueeze(1)


class StaticBatch:
    """The tensors of up to `num_rows` rows. One that no request uses attends to nothing and keeps nothing."""

    def __init__(self, num_rows: int, max_blocks: int, block_size: int, device: torch.device) -> None:
        self._block_size, pinned = block_size, device.type == "cuda"
        self._numbers = torch.zeros(5, num_rows, dtype=torch.int64, device=device)
        self._tables = torch.zeros(num_rows, max_blocks, dtype=torch.int32, device=device)
        self._host_numbers = torch.zeros(5, num_rows, dtype=torch.int64, pin_memory=pinned)
        self._host_tables = torch.zeros(num_rows, max_blocks, dtype=torch.int32, pin_memory=pinned)
        # By row the request's list of blocks, which only grows, and how many of them have been sent.
        self._sent: list[tuple[list[int], int]] = [([], 0)] * num_rows
        self._send([], [], [], [], [])

    def fill(self, token_ids: list[int], positions: list[int], step: DecodeStep) -> None:
        """Sends a step's numbers to the device. The step before must have ended: its tokens were read."""
        slots, shards, near = step.at_home()
        if self._fill_tables(shards.tables):
            self._tables.copy_(self._host_tables, non_blocking=True)
        self._send(token_ids, positions, slots, shards.stops, near.starts)

    def inputs(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """Token ids [b, 1] and positions [b] of the first rows."""
        return self._numbers[0, :num_rows, None], self._numbers[1, :num_rows]

    def rows(self, num_rows: int) -> tuple[Tensor, StaticRows, StaticRows]:
        """Slots of the first rows, what they attend to, and what of it lies within the window."""
        stops, near_starts = self._numbers[3:5, :num_rows].to(torch.int32)
        tables = self._tables[:num_rows]
        shards = StaticRows(tables, torch.zeros_like(stops), stops, self._block_size)
        near = StaticRows(tables, near_starts, stops, self._block_size)
        return self._numbers[2, :num_rows], shards, near

    def _send(self, *rows: list[int]) -> None:
        """Token ids, positions, slots, stops and first tokens within the window."""
        self._host_numbers.zero_()
        self._host_numbers[2] = NO_SLOT
        self._host_numbers[:, : len(rows[0])] = torch.tensor(rows, dtype=torch.int64)
        self._numbers.copy_(self._host_numbers, non_blocking=True)

    def _fill_tables(self, tables: list[list[int]]) -> bool:
        """Whether anything is new: a row's request, or a block of it."""
        changed = False
        for row, table in enumerate(tables):
            known, count = self._sent[row]
            first = count if known is table else 0
            if first < len(table):
                self._host_tables[row, first : len(table)] = torch.tensor(table[first:], dtype=torch.int32)
                changed = True
            self._sent[row] = table, len(table)
        return changed
