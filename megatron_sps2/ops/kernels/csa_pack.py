"""Kept keys and values packed to travel and laid out, as `ops.pack` says, in one pass each way."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_sps2.ops.kernels.csa_tiles import power_of_two
from megatron_sps2.ops.pack import Packing, Parcels

# Numbers of keys that a program looks at, kept or not: 32 for each of its 128 threads.
TILE_NUMBERS = 4096


@triton.jit
def unite_kernel(
    bits, tasks, first, united, counts, stride_h, stride_t, num_bytes, SIZE: tl.constexpr
):  # fmt: skip
    """One parcel and head: bits of its tasks, any of them; counts int32 `[parcels, n_kv]`."""
    at = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    byte = tl.arange(0, SIZE)
    here = bits + tl.program_id(1).to(tl.int64) * stride_h + byte
    kept = tl.zeros([SIZE], tl.int32)
    for i in range(tl.load(first + tl.program_id(0)), tl.load(first + tl.program_id(0) + 1)):
        task = tl.load(tasks + i)
        kept |= tl.load(here + task * stride_t, mask=byte < num_bytes, other=0).to(tl.int32)
    tl.store(united + at.to(tl.int64) * num_bytes + byte, kept.to(tl.uint8), mask=byte < num_bytes)
    tl.store(counts + at, _num_bits(kept))


@triton.jit
def _num_bits(byte):
    """How many bits of all bytes are set, int32."""
    pairs = byte - ((byte >> 1) & 0x55)
    fours = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    return tl.sum((fours + (fours >> 4)) & 0x0F, 0)


@triton.jit
def move_kernel(
    k, v, packed, bits, first, parcel_row, stride_kh, stride_ks, stride_vh, stride_vs, segment_size,
    PACK: tl.constexpr, SIZE: tl.constexpr, KEYS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of KEYS keys of one parcel and head those kept: to their places in `packed` `[keys, 2, d]`, or back."""
    head = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + head
    low, num_bytes = tl.program_id(2) * KEYS, segment_size // 8
    here, byte = bits + at * num_bytes, tl.arange(0, SIZE // 8)
    before = _num_bits(
        tl.load(here + byte, mask=byte < tl.minimum(low // 8, num_bytes), other=0).to(tl.int32)
    )
    offset = low + tl.arange(0, KEYS)
    mine = tl.load(here + offset // 8, mask=offset < segment_size, other=0).to(tl.int32)
    kept = (mine >> (offset % 8)) & 1
    place = tl.load(first + at) + before + tl.cumsum(kept, 0) - 1
    row = tl.load(parcel_row + tl.program_id(0)) + offset
    dim = tl.arange(0, BLOCK_D)
    chosen = (kept > 0)[:, None] & (dim < D)[None, :]
    keys = k + head * stride_kh + (row * stride_ks)[:, None] + dim[None, :]
    values = v + head * stride_vh + (row * stride_vs)[:, None] + dim[None, :]
    to = packed + (place * 2 * D)[:, None] + dim[None, :]
    if PACK:
        tl.store(to, tl.load(keys, mask=chosen), mask=chosen)
        tl.store(to + D, tl.load(values, mask=chosen), mask=chosen)
    else:
        tl.store(keys, tl.load(to, mask=chosen), mask=chosen)
        tl.store(values, tl.load(to + D, mask=chosen), mask=chosen)


def unite(bits: Tensor, parcels: Parcels) -> Packing:
    """As `ops.pack.unite`."""
    assert not bits.numel() or bits.stride(-1) == 1, "the last dim is contiguous"
    shape, device = (len(parcels), len(bits)), bits.device
    united = torch.empty(*shape, bits.shape[2], dtype=torch.uint8, device=device)
    first = torch.zeros(len(parcels) * len(bits) + 1, dtype=torch.int64, device=device)
    if len(parcels):
        counts = torch.empty(shape, dtype=torch.int32, device=device)
        unite_kernel[shape](
            *(bits, parcels.tasks, parcels.first, united, counts, *bits.stride()[:2], bits.shape[2]),
            SIZE=power_of_two(bits.shape[2]),
        )
        torch.cumsum(counts.flatten(), 0, out=first[1:])
    return Packing(united, first)


def pack(k: Tensor, v: Tensor, packing: Packing, parcels: Parcels, num_keys: int) -> Tensor:
    """As `ops.pack.pack`; the numbers of a key must lie together."""
    packed = k.new_empty(num_keys, 2, k.shape[2])
    _move(k, v, packed, packing, parcels, pack=True)
    return packed


def lay_out(packed: Tensor, packing: Packing, parcels: Parcels, k: Tensor, v: Tensor) -> None:
    """As `ops.pack.lay_out`; the numbers of a key must lie together."""
    _move(k, v, packed, packing, parcels, pack=False)


def _move(k: Tensor, v: Tensor, packed: Tensor, packing: Packing, parcels: Parcels, *, pack: bool) -> None:
    assert k.stride(-1) == v.stride(-1) == 1 and packed.is_contiguous(), "a key's numbers must lie together"
    if not len(packed):
        return
    segment_size, block_d = 8 * packing.bits.shape[2], power_of_two(k.shape[2])
    keys = max(8, TILE_NUMBERS // block_d)
    move_kernel[(len(parcels), len(k), triton.cdiv(segment_size, keys))](
        *(k, v, packed, packing.bits, packing.first, parcels.row),
        *(*k.stride()[:2], *v.stride()[:2], segment_size),
        PACK=pack,
        SIZE=power_of_two(segment_size),
        KEYS=keys,
        D=k.shape[2],
        BLOCK_D=block_d,
    )
