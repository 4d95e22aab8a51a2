"""Attention of splits of rows, and joining them: the Triton kernels behind ops.kernels.decode."""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def split_tokens(num_tokens, MAX_SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr):
    """Tokens of a split of a row: a multiple of MIN_SPLIT that leaves at most MAX_SPLITS of them."""
    room = MAX_SPLITS * MIN_SPLIT
    return tl.maximum((num_tokens + room - 1) // room, 1) * MIN_SPLIT


@triton.jit(do_not_specialize=["num_rows", "num_kv_heads", "bound", "table_stride"])
def attend_splits(
    q, keys, values, key_scales, value_scales, tables, starts, stops, parts, lses,
    scale_log2, num_rows, num_kv_heads, bound,
    q_row_stride, q_head_stride, key_head_stride, key_slot_stride, value_head_stride, value_slot_stride,
    key_scale_stride, value_scale_stride, table_stride,
    ROWS: tl.constexpr, GROUP: tl.constexpr, PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    MAX_SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr, QUANTIZED: tl.constexpr,
    TYPE: tl.constexpr,
):  # fmt: skip
    """q `[b, n, d]`, keys, values `[n_kv, slots, d]` -> parts `[b, n, bound, d]`, lses of base 2.

    Programs share the splits of all rows and KV heads evenly; where a row's begin, each finds out by itself.
    """
    rows = tl.arange(0, ROWS)
    first = tl.load(starts + rows, mask=rows < num_rows, other=0)
    lengths = tl.maximum(tl.load(stops + rows, mask=rows < num_rows, other=0) - first, 0)
    sizes = split_tokens(lengths, MAX_SPLITS, MIN_SPLIT)
    splits = (lengths + sizes - 1) // sizes
    after = tl.cumsum(splits, 0)  # splits of all rows up to this one
    for item in range(tl.program_id(0), tl.sum(splits, 0) * num_kv_heads, tl.num_programs(0)):
        place, kv_head = item // num_kv_heads, item % num_kv_heads
        row = tl.sum((after <= place).to(tl.int32), 0)
        split = place - tl.max(tl.where(after <= place, after, 0), 0)
        start, stop = tl.load(starts + row), tl.load(stops + row)
        size = split_tokens(stop - start, MAX_SPLITS, MIN_SPLIT)
        heads = tl.arange(0, PADDED_GROUP)
        dims = tl.arange(0, PADDED_DIM)
        real = (heads < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
        places = (kv_head * GROUP + heads)[:, None] * q_head_stride + dims[None, :]
        queries = tl.load(q + row.to(tl.int64) * q_row_stride + places, mask=real, other=0.0).to(TYPE)
        head = kv_head.to(tl.int64)
        acc, top, total = attend_tokens(
            queries, keys + head * key_head_stride, values + head * value_head_stride,
            key_scales, value_scales, tables + row.to(tl.int64) * table_stride,
            start + split * size, tl.minimum(start + (split + 1) * size, stop), scale_log2,
            key_slot_stride, value_slot_stride, head * key_scale_stride, head * value_scale_stride,
            PADDED_GROUP, HEAD_DIM, PADDED_DIM, BLOCK_SIZE, TILE, QUANTIZED, TYPE,
        )  # fmt: skip
        part = ((row * num_kv_heads + kv_head).to(tl.int64) * GROUP + heads) * bound + split
        tl.store(parts + part[:, None] * HEAD_DIM + dims[None, :], acc / total[:, None], mask=real)
        tl.store(lses + part, top + tl.math.log2(total), mask=heads < GROUP)


@triton.jit
def attend_tokens(
    queries, keys, values, key_scales, value_scales, table, begin, end, scale_log2,
    key_slot_stride, value_slot_stride, key_scale_start, value_scale_start,
    PADDED_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr, QUANTIZED: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Running softmax of one KV head over tokens begin <= t < end -> weighted values, top (base 2), total.

    What lies in slots of other tokens is not read: it may be anything.
    """
    dims = tl.arange(0, PADDED_DIM)
    acc = tl.zeros([PADDED_GROUP, PADDED_DIM], tl.float32)
    top = tl.full([PADDED_GROUP], -float("inf"), tl.float32)
    total = tl.zeros([PADDED_GROUP], tl.float32)
    tokens = begin + tl.arange(0, TILE)
    blocks = tl.load(table + tokens // BLOCK_SIZE, mask=tokens < end, other=0)
    for first in range(begin, end, TILE):
        tokens = first + tl.arange(0, TILE)
        held = tokens < end
        slots = blocks.to(tl.int64) * BLOCK_SIZE + tokens % BLOCK_SIZE
        # A tile ahead: else keys would have to wait for their addresses.
        blocks = tl.load(table + (tokens + TILE) // BLOCK_SIZE, mask=tokens + TILE < end, other=0)
        real = held[:, None] & (dims < HEAD_DIM)[None, :]
        k = tl.load(keys + slots[:, None] * key_slot_stride + dims[None, :], mask=real, other=0.0)
        v = tl.load(values + slots[:, None] * value_slot_stride + dims[None, :], mask=real, other=0.0)
        scores = tl.dot(queries, tl.trans(k.to(TYPE)), input_precision="ieee") * scale_log2
        if QUANTIZED:
            scores *= tl.load(key_scales + key_scale_start + slots, mask=held, other=0.0)[None, :]
        scores = tl.where(held[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.math.exp2(scores - new_top[:, None])
        past = tl.math.exp2(top - new_top)
        total = total * past + tl.sum(weights, 1)
        acc *= past[:, None]
        if QUANTIZED:
            scales = tl.load(value_scales + value_scale_start + slots, mask=held, other=0.0)
            # Relative to the tile's largest, so that fp16 holds them as well as it holds weights.
            largest = tl.max(scales, 0)
            weights *= (scales / largest)[None, :]
            acc += tl.dot(weights.to(TYPE), v.to(TYPE), input_precision="ieee") * largest
        else:
            acc = tl.dot(weights.to(TYPE), v.to(TYPE), acc, input_precision="ieee")
        top = new_top
    return acc, top, total


@triton.jit(do_not_specialize=["num_heads", "bound"])
def join_splits(
    parts, lses, starts, stops, out, lse, num_heads, bound,
    HEAD_DIM: tl.constexpr, DIMS: tl.constexpr, MAX_SPLITS: tl.constexpr, MIN_SPLIT: tl.constexpr,
):  # fmt: skip
    """What attend_splits gave -> out `[b, n, d]`, lse `[b, n]`: one program for a row, a head and DIMS of d.

    Sums always have MAX_SPLITS terms, zeros among them, so that their order is the same in every batch.
    """
    row, head = tl.program_id(0), tl.program_id(1)
    num_tokens = tl.maximum(tl.load(stops + row) - tl.load(starts + row), 0)
    size = split_tokens(num_tokens, MAX_SPLITS, MIN_SPLIT)
    splits = tl.arange(0, MAX_SPLITS)
    held = splits < (num_tokens + size - 1) // size
    dims = tl.program_id(2) * DIMS + tl.arange(0, DIMS)
    place = row.to(tl.int64) * num_heads + head
    own = tl.load(lses + place * bound + splits, mask=held, other=-float("inf"))
    top = tl.max(own, 0)
    # A row without tokens: exp2(-inf - -inf) would be NaN, and exp2(-inf - 0) is the 0 that is meant.
    shift = tl.where(top == -float("inf"), 0.0, top)
    weights = tl.math.exp2(own - shift)
    total = tl.sum(weights, 0)
    total = tl.where(total == 0, 1.0, total)
    real = held[:, None] & (dims < HEAD_DIM)[None, :]
    part = tl.load(parts + (place * bound + splits)[:, None] * HEAD_DIM + dims[None, :], mask=real, other=0.0)
    joined = tl.sum(part * weights[:, None], 0) / total
    tl.store(out + place * HEAD_DIM + dims, joined.to(out.dtype.element_ty), mask=dims < HEAD_DIM)
    tl.store(lse + place, (top + tl.math.log2(total)) * LN2, mask=tl.program_id(2) == 0)
