"""Attention with a running softmax over tiles of keys, in Triton: one program for each tile of queries.

Knows pointers and sizes; which tiles, splits and warps suit a call is chosen in ops.kernels.tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def running_softmax(scores, scale_log2, top, total):
    """scores `[ROWS, KEYS]` -> their weights, what the past is worth now, the new top (base 2) and total."""
    new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
    # A row that has seen no key yet: -inf - -inf would be NaN, and exp2(-inf - 0) is the 0 that is meant.
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    weights = tl.math.exp2(scores * scale_log2 - shift[:, None])
    past = tl.math.exp2(top - shift)
    return weights, past, new_top, total * past + tl.sum(weights, 1)


@triton.jit
def load_tile(
    described, batch, kv_head, start, KEYS: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr
):
    """Keys or values start..start + KEYS `[KEYS, BLOCK_D]`; zeros beyond the last one and beyond head_dim."""
    tile = described.load([batch, kv_head, start, 0]).reshape(KEYS, BLOCK_D)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def attend_span(
    queries, keys, values, batch, kv_head, start, stop, visible, scale_log2, scores, acc, top, total,
    MASKED: tl.constexpr, KEYS: tl.constexpr, BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The softmax's state after keys start <= j < stop, of which row r sees those below visible[r].

    `scores` are those of the first tile, and on return of the tile after the last. They are computed one tile
    ahead: the tensor cores have them to do while the softmax runs.
    """
    for key in tl.range(start, stop, KEYS):
        k = load_tile(keys, batch, kv_head, key + KEYS, KEYS, BLOCK_D, UPCAST)
        following = tl.dot(queries, k.T, input_precision=PRECISION)
        if MASKED:
            scores = tl.where(key + tl.arange(0, KEYS)[None, :] < visible[:, None], scores, -float("inf"))
        weights, past, top, total = running_softmax(scores, scale_log2, top, total)
        v = load_tile(values, batch, kv_head, key, KEYS, BLOCK_D, UPCAST)
        acc = tl.dot(weights.to(v.dtype), v, acc * past[:, None], input_precision=PRECISION)
        scores = following
    return scores, acc, top, total


@triton.jit(do_not_specialize=["sq", "sk", "b", "n_kv", "diagonal", "chunk", "num_tiles", "num_splits"])
def flash_kernel(
    q, keys, values, out, lse, stride_s, stride_b, stride_n,
    sq, sk, b, n_kv, diagonal, chunk, num_tiles, num_splits, scale_log2,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q `[sq, b, n, d]` strided, keys, values: descriptors of `[b, n_kv, sk, d]` -> out, lse of each split.

    out `[num_splits, sq, b, n, d]` and lse `[num_splits, sq, b, n]` fp32 are contiguous. A row of a tile is
    one query of one head: the GROUP heads that share a KV head lie side by side, so that few queries, too,
    fill a tile.
    """
    # Queries that see most keys come first: the last programs to start are the short ones.
    program = tl.program_id(0)
    split, program = program % num_splits, program // num_splits
    tile, pair = num_tiles - 1 - program % num_tiles, program // num_tiles
    batch, kv_head = pair // n_kv, pair % n_kv

    rows = tile * ROWS + tl.arange(0, ROWS)
    tokens, heads = rows // GROUP, kv_head * GROUP + rows % GROUP
    dims = tl.arange(0, BLOCK_D)
    inside = (tokens < sq)[:, None] & (dims < D)[None, :]
    offsets = tokens.to(tl.int64) * stride_s + batch.to(tl.int64) * stride_b + heads.to(tl.int64) * stride_n
    queries = tl.load(q + offsets[:, None] + dims[None, :], mask=inside, other=0.0)
    if UPCAST:
        queries = queries.to(tl.float32)

    # The tile's last query sees keys of this split up to `stop`; all its queries see those before `clear`.
    visible = tl.minimum(tokens + diagonal + 1, sk)
    start = split * chunk
    end = tl.minimum(start + chunk, sk)
    last = tl.minimum((tile * ROWS + ROWS - 1) // GROUP, sq - 1)
    stop = tl.minimum(last + diagonal + 1, end)
    common = tl.minimum(tile * ROWS // GROUP + diagonal + 1, end)
    clear = start + tl.maximum(common - start, 0) // KEYS * KEYS

    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    first = load_tile(keys, batch, kv_head, start, KEYS, BLOCK_D, UPCAST)
    scores = tl.dot(queries, first.T, input_precision=PRECISION)
    scores, acc, top, total = attend_span(
        queries, keys, values, batch, kv_head, start, clear, visible, scale_log2, scores, acc, top, total,
        False, KEYS, BLOCK_D, UPCAST, PRECISION,
    )  # fmt: skip
    scores, acc, top, total = attend_span(
        queries, keys, values, batch, kv_head, clear, stop, visible, scale_log2, scores, acc, top, total,
        True, KEYS, BLOCK_D, UPCAST, PRECISION,
    )  # fmt: skip

    total = tl.where(total == 0.0, 1.0, total)  # A query without keys: top is -inf, acc is 0.
    offsets = ((split.to(tl.int64) * sq + tokens) * b + batch) * (n_kv * GROUP) + heads
    tl.store(lse + offsets, (top + tl.math.log2(total)) * LN_2, mask=tokens < sq)
    acc = acc / total[:, None]
    tl.store(out + offsets[:, None] * D + dims[None, :], acc.to(out.dtype.element_ty), mask=inside)
