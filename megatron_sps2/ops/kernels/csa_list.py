"""Kept keys as lists of rows: bits are counted, counts added up on the device, rows written in order.

The list has room for all keys: how many there are nobody on the host needs to know.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_sps2.ops.kernels.csa_tiles import power_of_two
from megatron_sps2.ops.reads import Reads


@dataclass(frozen=True, slots=True)
class KeptRows:
    """rows int32: of k and v, rising in a task. first int64 `[n_kv * tasks + 1]`: where a task begins."""

    rows: Tensor
    first: Tensor


@triton.jit
def _kept(bits, stride_h, stride_t, segment_size, SIZE: tl.constexpr):
    """int32 `[SIZE]`, 1 for each key of this program's task and head that is kept."""
    offset = tl.arange(0, SIZE)
    here = bits + tl.program_id(1).to(tl.int64) * stride_h + tl.program_id(0) * stride_t
    byte = tl.load(here + offset // 8, mask=offset < segment_size, other=0).to(tl.int32)
    return (byte >> (offset % 8)) & 1


@triton.jit
def count_kernel(bits, counts, stride_h, stride_t, segment_size, SIZE: tl.constexpr):
    """counts int32 `[n_kv, tasks]`."""
    kept = _kept(bits, stride_h, stride_t, segment_size, SIZE)
    tl.store(counts + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), tl.sum(kept, 0))


@triton.jit
def list_kernel(bits, first, task_row, rows, stride_h, stride_t, segment_size, SIZE: tl.constexpr):
    """Writes the rows of one task and head where they belong."""
    kept = _kept(bits, stride_h, stride_t, segment_size, SIZE)
    place = tl.load(first + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) + tl.cumsum(kept, 0) - 1
    row = tl.load(task_row + tl.program_id(0)) + tl.arange(0, SIZE)
    tl.store(rows + place, row, mask=kept > 0)


def list_kept(bits: Tensor, reads: Reads, tasks: range) -> KeptRows:
    """bits uint8 `[n_kv, tasks of reads, G / 8]` -> the rows that `tasks` keep, head after head."""
    size, device = reads.segment_size, bits.device
    bits, count = bits[:, tasks.start : tasks.stop], len(bits) * len(tasks)
    assert bits.stride(-1) == 1, "the last dim is contiguous"
    first = torch.zeros(count + 1, dtype=torch.int64, device=device)
    rows = torch.empty(max(1, count * size), dtype=torch.int32, device=device)
    if count:
        grid, where = (len(tasks), len(bits)), (*bits.stride()[:2], size, power_of_two(size))
        counts = torch.empty(count, dtype=torch.int32, device=device)
        count_kernel[grid](bits, counts, *where)
        torch.cumsum(counts, 0, out=first[1:])
        list_kernel[grid](bits, first, reads.tensors(device).task_row[tasks.start :], rows, *where)
    return KeptRows(rows, first)
