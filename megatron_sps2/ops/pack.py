"""Kept keys and values packed to travel, and laid out where they came to. Knows bits and rows, no ranks.

A parcel is what one segment sends to one place: each key that any of its readers there keeps, once. Keys lie
in a message parcel after parcel, head after head and by position, each with its value beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from megatron_sps2.ops import sparsity


@dataclass(frozen=True, slots=True)
class Parcels:
    """Which tasks (ops.reads) keep keys of a parcel, and where its segment begins in keys and values."""

    tasks: Tensor  # int64, parcel after parcel
    parcel: Tensor  # int64, of each of `tasks`
    first: Tensor  # int32 [parcels + 1]: where the tasks of a parcel begin
    row: Tensor  # int64 [parcels]

    @classmethod
    def of(cls, tasks: Sequence[Sequence[int]], rows: Sequence[int], device: torch.device) -> Parcels:
        """Both by parcel; a parcel without tasks holds nothing."""

        def ints(values: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        return cls(
            tasks=ints([task for each in tasks for task in each]),
            parcel=ints([i for i, each in enumerate(tasks) for _ in each]),
            first=ints([*accumulate(map(len, tasks), initial=0)], torch.int32),
            row=ints(rows),
        )

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True, slots=True)
class Packing:
    """What parcels hold: bits uint8 `[parcels, n_kv, G / 8]`; first int64 `[parcels * n_kv + 1]`: where the
    keys of a parcel and head begin in a message.
    """

    bits: Tensor
    first: Tensor


def unite(bits: Tensor, parcels: Parcels) -> Packing:
    """bits uint8 `[n_kv, tasks, G / 8]`, what each task keeps -> what any task of a parcel keeps."""
    masks = sparsity.unpack_bits(bits.index_select(1, parcels.tasks)).transpose(0, 1)
    counts = masks.new_zeros(len(parcels), *masks.shape[1:], dtype=torch.int16)
    counts.index_add_(0, parcels.parcel, masks.short())
    kept = counts > 0
    first = torch.zeros(len(parcels) * len(bits) + 1, dtype=torch.int64, device=bits.device)
    torch.cumsum(kept.sum(2).flatten(), 0, out=first[1:])
    return Packing(sparsity.pack_bits(kept), first)


def pack(k: Tensor, v: Tensor, packing: Packing, parcels: Parcels, num_keys: int) -> Tensor:
    """k, v `[n_kv, s, d]` -> `[num_keys, 2, d]`, the message; num_keys is the last of `packing.first`."""
    rows = _rows(packing, parcels, k.shape[1], num_keys)
    return torch.stack([x.flatten(0, 1).index_select(0, rows) for x in (k, v)], dim=1)


def lay_out(packed: Tensor, packing: Packing, parcels: Parcels, k: Tensor, v: Tensor) -> None:
    """A message `[keys, 2, d]` into k and v, contiguous `[n_kv, s, d]`."""
    rows = _rows(packing, parcels, k.shape[1], len(packed))
    for x, came in zip((k, v), packed.unbind(1), strict=True):
        x.view(-1, x.shape[2]).index_copy_(0, rows, came)


def _rows(packing: Packing, parcels: Parcels, num_rows: int, num_keys: int) -> Tensor:
    """int64 `[num_keys]`: of the keys and values of all heads, in the order of a message."""
    kept = sparsity.unpack_bits(packing.bits)
    parcel, head, offset = torch.nonzero_static(kept, size=num_keys).unbind(1)
    return head * num_rows + parcels.row[parcel] + offset
