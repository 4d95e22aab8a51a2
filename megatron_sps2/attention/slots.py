"""Slots for the keys, or the values, of one layer: as they come, or float8 with a scale for each row.

Knows slots; which request has which is the cache's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sps2.attention.huge_pages import prefer_huge_pages
from megatron_sps2.config import KVCacheDType
from megatron_sps2.ops.quantized import dequantize, quantize


@dataclass(frozen=True, slots=True)
class SlotRun:
    """Neighbouring cache slots start <= slot < stop."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Slots:
    """One row of d numbers for each KV head and slot."""

    rows: Tensor  # [n_kv, num_slots, d]; float8_e4m3fn where there are scales
    scales: Tensor | None  # fp32 [n_kv, num_slots]
    dtype: torch.dtype  # of what is written and read

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: torch.device | str,
        kept: KVCacheDType,
    ) -> Slots:
        """shape: [n_kv, num_slots, d], so that a head's keys are one matrix for the kernels."""
        stored = dtype if kept == "auto" else torch.float8_e4m3fn
        rows = torch.empty(shape, dtype=stored, device=device)
        prefer_huge_pages(rows)
        scales = None if kept == "auto" else torch.empty(shape[:2], dtype=torch.float32, device=device)
        return cls(rows, scales, dtype)

    @property
    def bytes_per_slot(self) -> int:
        """Over all KV heads."""
        return sum(part[:, :1].numel() * part.element_size() for part in self._parts)

    def write(self, runs: Sequence[SlotRun], x: Tensor) -> Tensor:
        """x [s, n_kv, d] into the slots of `runs` -> what `read` gives for them, [s, n_kv, d]."""
        assert sum(map(len, runs)) == len(x), f"{len(x)} tokens for {sum(map(len, runs))} slots"
        if self.scales is None:
            _put(self.rows, runs, x)
            return x
        stored, scales = quantize(x)
        _put(self.rows, runs, stored)
        _put(self.scales, runs, scales)
        return dequantize(stored, scales, self.dtype)

    def read(self, runs: Sequence[SlotRun]) -> Tensor:
        """[s, 1, n_kv, d]: a view where it is one run of numbers kept as they came, else made anew."""
        found = _gather(self.rows, runs)
        if self.scales is not None:
            found = dequantize(found, _gather(self.scales, runs), self.dtype)
        return found.transpose(0, 1).unsqueeze(1)

    def to_host(self, runs: Sequence[SlotRun]) -> tuple[Tensor, ...]:
        """A copy in host memory of what is stored there, for `from_host`; the cache cannot write to it."""
        return tuple(_to_host(_gather(part, runs).transpose(0, 1)) for part in self._parts)

    def from_host(self, runs: Sequence[SlotRun], stored: tuple[Tensor, ...]) -> None:
        """Brings back what `to_host` gave, bit for bit."""
        for part, copy in zip(self._parts, stored, strict=True):
            _put(part, runs, copy.to(part.device))

    @property
    def _parts(self) -> tuple[Tensor, ...]:
        return (self.rows,) if self.scales is None else (self.rows, self.scales)


def _put(slots: Tensor, runs: Sequence[SlotRun], x: Tensor) -> None:
    """x [s, n_kv, ...] into slots [n_kv, num_slots, ...]"""
    first = 0
    for run in runs:
        last = first + len(run)
        slots[:, run.start : run.stop] = x[first:last].transpose(0, 1)
        first = last


def _gather(slots: Tensor, runs: Sequence[SlotRun]) -> Tensor:
    """[n_kv, num_slots, ...] -> [n_kv, s, ...]"""
    if len(runs) == 1:
        return slots[:, runs[0].start : runs[0].stop]
    return torch.cat([slots[:, run.start : run.stop] for run in runs] or [slots[:, :0]], dim=1)


def _to_host(x: Tensor) -> Tensor:
    """Page-locked beside a GPU."""
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
    return host.copy_(x)
