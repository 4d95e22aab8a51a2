"""Attention of single queries over keys that lie in pages: one layer of a shard, and rows of a decode batch.

Pure tensor functions and plain integers. Knows slots and blocks, not whose they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_sps2.ops.attend import attend


@dataclass(frozen=True, slots=True)
class SlotRun:
    """Neighbouring slots start <= slot < stop."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class PagedKV:
    """One layer's keys and values of a shard, each `[n_kv, num_slots, d]`; block b is slots b * size ...

    Where they are float8_e4m3fn, a stored number counts times its slot's and head's scale, fp32 `[n_kv,
    num_slots]`.
    """

    keys: Tensor
    values: Tensor
    block_size: int
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    def read(self, runs: Sequence[SlotRun]) -> tuple[Tensor, Tensor]:
        """k, v `[s, 1, n_kv, d]` of `runs`: a view where they are one run, else gathered."""
        return _gather(self.keys, runs), _gather(self.values, runs)


@dataclass(slots=True)
class Slots:
    """Where new tokens go, one after another."""

    runs: list[SlotRun]
    _tensor: Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return sum(map(len, self.runs))

    def tensor(self, device: torch.device) -> Tensor:
        """int64 `[s]`; made once for all layers."""
        if self._tensor is None:
            slots = [slot for run in self.runs for slot in range(run.start, run.stop)]
            self._tensor = torch.tensor(slots, dtype=torch.int64, device=device)
        return self._tensor


@dataclass(slots=True)
class PagedRows:
    """Which tokens each row of a batch attends to: starts[i] <= t < stops[i] of the blocks in tables[i].

    Made once for all layers of a step.
    """

    tables: list[list[int]]
    starts: list[int]
    stops: list[int]
    block_size: int
    _runs: list[list[SlotRun]] | None = field(default=None, repr=False)
    _tensors: tuple[Tensor, Tensor, Tensor] | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.tables)

    @property
    def max_tokens(self) -> int:
        """The most that a row attends to."""
        return max((stop - start for start, stop in zip(self.starts, self.stops, strict=True)), default=0)

    @property
    def runs(self) -> list[list[SlotRun]]:
        """By row, in as few runs of slots as can be."""
        if self._runs is None:
            rows = zip(self.tables, self.starts, self.stops, strict=True)
            self._runs = [slot_runs(*row, self.block_size) for row in rows]
        return self._runs

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """int32 tables `[b, m]`, filled up with block 0, starts `[b]` and stops `[b]`."""
        if self._tensors is None:
            width = max(map(len, self.tables), default=0)
            tables = [[*table, *[0] * (width - len(table))] for table in self.tables]
            self._tensors = (
                torch.tensor(tables, dtype=torch.int32, device=device).view(len(tables), width),
                torch.tensor(self.starts, dtype=torch.int32, device=device),
                torch.tensor(self.stops, dtype=torch.int32, device=device),
            )
        return self._tensors


def slot_runs(blocks: Sequence[int], start: int, stop: int, block_size: int) -> list[SlotRun]:
    """Where tokens start <= t < stop of `blocks` lie, in as few runs as can be."""
    found = list[SlotRun]()
    while start < stop:
        slot = blocks[start // block_size] * block_size + start % block_size
        count = min(stop - start, block_size - start % block_size)
        if found and found[-1].stop == slot:
            found[-1] = SlotRun(found[-1].start, slot + count)
        else:
            found.append(SlotRun(slot, slot + count))
        start += count
    return found


def attend_paged(q: Tensor, kv: PagedKV, rows: PagedRows, *, scale: float) -> tuple[Tensor, Tensor]:
    """q `[b, n, d]` -> out `[b, n, d]`, lse `[b, n]` fp32; row i attends to its tokens, all of them.

    A row without tokens gives out 0 and lse -inf. Row by row, where the keys lie.
    """
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
    for i, runs in enumerate(rows.runs):
        if runs:
            k, v = kv.read(runs)
            row_out, row_lse = attend(q[i : i + 1, None], k, v, scale=scale, diagonal=None)
            out[i], lse[i] = row_out[0, 0], row_lse[0, 0]
    return out, lse


def write_paged(kv: PagedKV, slots: Slots, k: Tensor, v: Tensor) -> None:
    """k, v `[s, n_kv, d]` into `slots`, s of them."""
    assert len(slots) == len(k), f"{len(k)} tokens for {len(slots)} slots"
    first = 0
    for run in slots.runs:
        last = first + len(run)
        kv.keys[:, run.start : run.stop] = k[first:last].transpose(0, 1)
        kv.values[:, run.start : run.stop] = v[first:last].transpose(0, 1)
        first = last


def _gather(slots: Tensor, runs: Sequence[SlotRun]) -> Tensor:
    """[n_kv, num_slots, d] -> [s, 1, n_kv, d]"""
    if len(runs) == 1:
        found = slots[:, runs[0].start : runs[0].stop]
    else:
        found = torch.cat([slots[:, run.start : run.stop] for run in runs] or [slots[:, :0]], dim=1)
    return found.transpose(0, 1).unsqueeze(1)
