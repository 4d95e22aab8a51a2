"""Attention of single queries over keys that lie in pages: one layer of a shard, and rows of a decode batch.

Pure tensor functions and plain integers. Knows slots and blocks, not whose they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_sps2.ops.attend import attend
from megatron_sps2.ops.decode_attend import CONVERTED_KEYS
from megatron_sps2.ops.merge import merge
from megatron_sps2.ops.quantized import dequantize, quantize

# Of a token that is not kept here.
NO_SLOT = -1


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

    @property
    def parts(self) -> list[Tensor]:
        """All that is stored, `[n_kv, num_slots, ...]` each: keys, values, and scales where there are."""
        return [x for x in (self.keys, self.values, self.key_scales, self.value_scales) if x is not None]

    def read(self, runs: Sequence[SlotRun], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """k, v `[s, 1, n_kv, d]` of `runs`: a view where they are one run, else gathered.

        Stored float8 becomes numbers of `dtype`; other keys and values are of that dtype already.
        """
        keys = _read(self.keys, self.key_scales, runs, dtype)
        return keys, _read(self.values, self.value_scales, runs, dtype)


@dataclass(slots=True)
class Slots:
    """Where new tokens go, one after another."""

    runs: list[SlotRun]
    _tensor: Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return sum(map(len, self.runs))

    @property
    def numbers(self) -> list[int]:
        """One by one."""
        return [slot for run in self.runs for slot in range(run.start, run.stop)]

    def tensor(self, device: torch.device) -> Tensor:
        """int64 `[s]`; made once for all layers."""
        if self._tensor is None:
            self._tensor = torch.tensor(self.numbers, dtype=torch.int64, device=device)
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

    A row without tokens gives out 0 and lse -inf. Row by row, where the keys lie; float8 ones piece by piece,
    so that only one piece is held as numbers.
    """
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
    for i, runs in enumerate(rows.runs):
        if runs:
            out[i], lse[i] = _attend_row(q[i : i + 1, None], kv, runs, scale)
    return out, lse


def _attend_row(q: Tensor, kv: PagedKV, runs: list[SlotRun], scale: float) -> tuple[Tensor, Tensor]:
    """q `[1, 1, n, d]` -> out `[n, d]`, lse `[n]`"""
    pieces = [runs] if kv.key_scales is None else list(_cut(runs, CONVERTED_KEYS))
    parts = [attend(q, *kv.read(piece, q.dtype), scale=scale, diagonal=None) for piece in pieces]
    outs, lses = (torch.stack([x[0, 0] for x in each]) for each in zip(*parts, strict=True))
    return merge(outs, lses) if len(parts) > 1 else (outs[0], lses[0])


def _cut(runs: Sequence[SlotRun], most: int) -> Iterator[list[SlotRun]]:
    """The same slots in pieces of so many at most."""
    piece, room = list[SlotRun](), most
    for run in runs:
        start = run.start
        while start < run.stop:
            stop = min(run.stop, start + room)
            piece.append(SlotRun(start, stop))
            start, room = stop, room - (stop - start)
            if not room:
                yield piece
                piece, room = [], most
    if piece:
        yield piece


def attend_paged_reference(q: Tensor, kv: PagedKV, rows: PagedRows, *, scale: float) -> tuple[Tensor, Tensor]:
    """As attend_paged, from the rows' tensors and with all scores at once: the host reads nothing."""
    tables, starts, stops = rows.tensors(q.device)
    places = torch.arange(tables.shape[1] * rows.block_size, device=q.device)
    seen = (places >= starts[:, None]) & (places < stops[:, None])
    slots = tables.repeat_interleave(rows.block_size, dim=1) * rows.block_size + places % rows.block_size
    k, v = (
        _dequantized(held, scales)[:, torch.where(seen, slots, 0)].movedim(0, 2).float()
        for held, scales in ((kv.keys, kv.key_scales), (kv.values, kv.value_scales))
    )  # [b, s, n_kv, d]
    k, v = (x.masked_fill(~seen[:, :, None, None], 0.0) for x in (k, v))
    heads = q.float().unflatten(1, (k.shape[2], -1))
    scores = torch.einsum("bkgd,bskd->bkgs", heads, k) * scale
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
    return torch.einsum("bkgs,bskd->bkgd", weights, v).flatten(1, 2).to(q.dtype), lse.flatten(1, 2)


def _dequantized(held: Tensor, scales: Tensor | None) -> Tensor:
    return held if scales is None else dequantize(held, scales)


def write_paged(kv: PagedKV, slots: Slots, k: Tensor, v: Tensor) -> None:
    """k, v `[s, n_kv, d]` into `slots`, s of them; rounded where `kv` has scales."""
    assert len(slots) == len(k), f"{len(k)} tokens for {len(slots)} slots"
    _write(kv.keys, kv.key_scales, slots.runs, k)
    _write(kv.values, kv.value_scales, slots.runs, v)


def gather_slots(stored: Tensor, runs: Sequence[SlotRun]) -> Tensor:
    """`[n_kv, num_slots, ...]` -> `[n_kv, s, ...]`: a view where `runs` is one."""
    if len(runs) == 1:
        return stored[:, runs[0].start : runs[0].stop]
    return torch.cat([stored[:, run.start : run.stop] for run in runs] or [stored[:, :0]], dim=1)


def put_slots(stored: Tensor, runs: Sequence[SlotRun], x: Tensor) -> None:
    """x `[n_kv, s, ...]` into `runs` of `[n_kv, num_slots, ...]`."""
    first = 0
    for run in runs:
        last = first + len(run)
        stored[:, run.start : run.stop] = x[:, first:last]
        first = last


def _read(stored: Tensor, scales: Tensor | None, runs: Sequence[SlotRun], dtype: torch.dtype) -> Tensor:
    """`[s, 1, n_kv, d]`"""
    found = gather_slots(stored, runs)
    if scales is not None:
        found = dequantize(found, gather_slots(scales, runs), dtype)
    return found.transpose(0, 1).unsqueeze(1)


def _write(stored: Tensor, scales: Tensor | None, runs: Sequence[SlotRun], x: Tensor) -> None:
    """x `[s, n_kv, d]`"""
    rows = x.transpose(0, 1)
    if scales is not None:
        rows, found = quantize(rows)
        put_slots(scales, runs, found)
    put_slots(stored, runs, rows)
