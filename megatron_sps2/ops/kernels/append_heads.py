"""Turning heads and keeping keys and values: the Triton kernel behind ops.kernels.append."""

from __future__ import annotations

import triton
import triton.language as tl

from megatron_sps2.ops.kernels.rounding import rounded

# The largest float8_e4m3fn, and the bits of 448 * 2^-126 in fp32: as in ops.quantized.
LARGEST = tl.constexpr(448.0)
LEAST_TOP_BITS = tl.constexpr(0x04E00000)


@triton.jit(do_not_specialize=["num_heads", "num_kv_heads", "num_query_tiles"])
def append_heads(
    q, k, v, cos, sin, turned_q, turned_k, keys, values, key_scales, value_scales, slots,
    num_heads, num_kv_heads, num_query_tiles,
    q_stride, q_head_stride, k_stride, k_head_stride, v_stride, v_head_stride, cos_stride, sin_stride,
    key_head_stride, key_slot_stride, value_head_stride, value_slot_stride,
    key_scale_stride, value_scale_stride,
    ROTARY: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, HEADS: tl.constexpr,
    QUANTIZED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program for HEADS heads of one token: the first tiles are its queries, then its keys and values.

    The first ROTARY numbers of a query or key turn; with 0, turned_q and turned_k are not written.
    """
    token, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    heads, dims = tl.arange(0, HEADS), tl.arange(0, PADDED_DIM)
    if tile < num_query_tiles:
        heads += tile * HEADS
        real = (heads < num_heads)[:, None] & (dims < HEAD_DIM)[None, :]
        if ROTARY:
            turned = turn(
                q + token * q_stride + heads[:, None] * q_head_stride, dims, real,
                cos + token * cos_stride, sin + token * sin_stride, ROTARY, INTERPRETED,
            )  # fmt: skip
            place = (token * num_heads + heads)[:, None] * HEAD_DIM + dims[None, :]
            tl.store(turned_q + place, turned.to(turned_q.dtype.element_ty), mask=real)
    else:
        heads += (tile - num_query_tiles) * HEADS
        real = (heads < num_kv_heads)[:, None] & (dims < HEAD_DIM)[None, :]
        own_k = k + token * k_stride + heads[:, None] * k_head_stride
        own_v = v + token * v_stride + heads[:, None] * v_head_stride
        if ROTARY:
            new_k = turn(
                own_k, dims, real, cos + token * cos_stride, sin + token * sin_stride, ROTARY, INTERPRETED
            )
            place = (token * num_kv_heads + heads)[:, None] * HEAD_DIM + dims[None, :]
            tl.store(turned_k + place, new_k.to(turned_k.dtype.element_ty), mask=real)
        else:
            new_k = tl.load(own_k + dims[None, :], mask=real, other=0.0).to(tl.float32)
        new_v = tl.load(own_v + dims[None, :], mask=real, other=0.0).to(tl.float32)
        slot = tl.load(slots + token)
        kept = heads < tl.where(slot >= 0, num_kv_heads, 0)
        keep(
            new_k, keys, key_scales, slot, heads.to(tl.int64), dims, kept,
            key_head_stride, key_slot_stride, key_scale_stride, HEAD_DIM, QUANTIZED, INTERPRETED,
        )  # fmt: skip
        keep(
            new_v, values, value_scales, slot, heads.to(tl.int64), dims, kept,
            value_head_stride, value_slot_stride, value_scale_stride, HEAD_DIM, QUANTIZED, INTERPRETED,
        )  # fmt: skip


@triton.jit
def turn(heads, dims, real, cos, sin, ROTARY: tl.constexpr, INTERPRETED: tl.constexpr):
    """Heads at pointers `[HEADS, 1]` -> turned, fp32 `[HEADS, PADDED_DIM]`, rounded where Megatron rounds."""
    HALF: tl.constexpr = ROTARY // 2
    TYPE: tl.constexpr = heads.dtype.element_ty
    partners = tl.where(dims < HALF, dims + HALF, tl.where(dims < ROTARY, dims - HALF, dims))
    x = tl.load(heads + dims[None, :], mask=real, other=0.0).to(tl.float32)
    partner = tl.load(heads + partners[None, :], mask=real, other=0.0).to(tl.float32)
    partner = tl.where((dims < HALF)[None, :], -partner, partner)
    cosines = tl.load(cos + dims, mask=dims < ROTARY, other=0.0).to(tl.float32)[None, :]
    sines = tl.load(sin + dims, mask=dims < ROTARY, other=0.0).to(tl.float32)[None, :]
    turned = rounded(x * cosines, TYPE, INTERPRETED) + rounded(partner * sines, TYPE, INTERPRETED)
    return tl.where((dims < ROTARY)[None, :], rounded(turned, TYPE, INTERPRETED), x)


@triton.jit
def keep(
    x, held, scales, slot, heads, dims, kept, head_stride, slot_stride, scale_stride,
    HEAD_DIM: tl.constexpr, QUANTIZED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """x fp32 `[HEADS, PADDED_DIM]` into `slot` of held `[n_kv, num_slots, d]`, the heads that are `kept`."""
    TYPE: tl.constexpr = held.dtype.element_ty
    if QUANTIZED:
        # Taken as integers, NaN is larger than any number, and so spoils the row's scale.
        top = tl.maximum(tl.max(tl.abs(x).to(tl.int32, bitcast=True), 1), LEAST_TOP_BITS)
        own = tl.div_rn(top.to(tl.float32, bitcast=True), LARGEST)
        x = tl.div_rn(x, own[:, None])
        tl.store(scales + heads * scale_stride + slot, own, mask=kept)
    real = kept[:, None] & (dims < HEAD_DIM)[None, :]
    place = heads[:, None] * head_stride + slot * slot_stride + dims[None, :]
    tl.store(held + place, rounded(x, TYPE, INTERPRETED).to(TYPE), mask=real)
