"""CSA's attention: all segments and heads in one launch, kept keys gathered from where they lie.

A tile of queries goes through its reader's kept keys and then through its own segment, with one running softmax:
no partial result is stored, none merged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import triton
import triton.language as tl
from torch import Tensor

from megatron_sps2.ops.kept import Timed
from megatron_sps2.ops.kernels.csa_list import list_kept
from megatron_sps2.ops.kernels.csa_tiles import MAX_ROWS, attend_constants
from megatron_sps2.ops.reads import Reads
from megatron_sps2.ops.tile import LN2

# Kept keys listed at a time, over heads: 256 MiB of rows where all are kept.
MAX_LISTED = 2**26


@triton.jit
def add_tile(
    q, keys, values, row, seen, stride_k, stride_v, scale_log2, acc, top, total,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The softmax's state after the keys in `row` `[KEYS]`, of which MASKED says that only `seen` count.

    `seen` `[ROWS or 1, KEYS]`. What no row sees is not read: it may hold anything.
    """
    dim = tl.arange(0, BLOCK_D)
    row = row.to(tl.int64)
    k_at, v_at = keys + row[None, :] * stride_k + dim[:, None], values + row[:, None] * stride_v + dim[None, :]
    if MASKED:
        some = tl.max(seen.to(tl.int32), 0) > 0
        k = tl.load(k_at, mask=some[None, :] & (dim < D)[:, None], other=0.0)
        v = tl.load(v_at, mask=some[:, None] & (dim < D)[None, :], other=0.0)
    elif D == BLOCK_D:
        k, v = tl.load(k_at), tl.load(v_at)
    else:
        k = tl.load(k_at, mask=(dim < D)[:, None], other=0.0)
        v = tl.load(v_at, mask=(dim < D)[None, :], other=0.0)
    if UPCAST:
        k, v = k.to(tl.float32), v.to(tl.float32)
    scores = tl.dot(q, k, input_precision=PRECISION)
    if MASKED:
        scores = tl.where(seen, scores, -float("inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * scale_log2)
    # A row that has seen no key yet: -inf - -inf would be NaN, and exp2(-inf - 0) is the 0 that is meant.
    shift = tl.where(higher == -float("inf"), 0.0, higher) if MASKED else higher
    weights = tl.exp2(scores * scale_log2 - shift[:, None])
    past = tl.exp2(top - shift)
    acc = tl.dot(weights.to(v.dtype), v, acc * past[:, None], input_precision=PRECISION)
    return acc, higher, total * past + tl.sum(weights, 1)


@triton.jit
def attend_kernel(
    q, k, v, out, rows, first, num_rows, query_row, key_row, first_task, first_reader, first_listed, num_listed,
    stride_qs, stride_qn, stride_kh, stride_ks, stride_vh, stride_vs, stride_os, stride_on, scale_log2,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q, out `[s, n, d]`, k, v `[n_kv, s, d]`. A program's rows are one query of one head each: the GROUP heads
    that share a KV head lie side by side."""
    # Readers with the longest past come first: the last programs to start are the short ones.
    reader = first_reader + tl.num_programs(2) - 1 - tl.program_id(2)
    head = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    query = row // GROUP
    count = tl.load(num_rows + reader)
    if tl.program_id(0) * ROWS >= count * GROUP:
        return
    dim = tl.arange(0, BLOCK_D)
    inside = (query < count)[:, None] & (dim < D)[None, :]
    line = (tl.load(query_row + reader) + query).to(tl.int64)
    q_head = head * GROUP + row % GROUP
    queries = tl.load(
        q + (line * stride_qs + q_head * stride_qn)[:, None] + dim[None, :], mask=inside, other=0.0
    )
    if UPCAST:
        queries = queries.to(tl.float32)
    keys, values = k + head * stride_kh, v + head * stride_vh
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    key = tl.arange(0, KEYS)

    # Kept keys are all in the past of every row; only the last tile of them is not full.
    listed = first + head * num_listed - first_listed
    begin = tl.load(listed + tl.load(first_task + reader))
    num_kept = (tl.load(listed + tl.load(first_task + reader + 1)) - begin).to(tl.int32)
    kept = rows + begin
    num_full = num_kept // KEYS * KEYS
    for low in range(0, num_full, KEYS):
        acc, top, total = add_tile(
            queries, keys, values, tl.load(kept + low + key), None, stride_ks, stride_vs, scale_log2,
            acc, top, total, False, D, BLOCK_D, UPCAST, PRECISION,
        )  # fmt: skip
    if num_full < num_kept:
        seen = num_full + key < num_kept
        acc, top, total = add_tile(
            queries, keys, values, tl.load(kept + num_full + key, mask=seen, other=0), seen[None, :],
            stride_ks, stride_vs, scale_log2, acc, top, total, True, D, BLOCK_D, UPCAST, PRECISION,
        )  # fmt: skip

    # The own segment, up to the last query of the tile.
    own = tl.load(key_row + reader)
    stop = tl.minimum(count, (tl.program_id(0) * ROWS + ROWS - 1) // GROUP + 1)
    for low in range(0, stop, KEYS):
        seen = (low + key)[None, :] <= tl.minimum(query, count - 1)[:, None]
        acc, top, total = add_tile(
            queries, keys, values, own + low + key, seen, stride_ks, stride_vs, scale_log2,
            acc, top, total, True, D, BLOCK_D, UPCAST, PRECISION,
        )  # fmt: skip
    place = out + (line * stride_os + q_head * stride_on)[:, None] + dim[None, :]
    tl.store(place, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)


def attend_kept(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bits: Tensor,
    reads: Reads,
    out: Tensor,
    *,
    scale: float,
    num_pauses: int = 1,
    timed: Timed = lambda name: nullcontext(),
) -> Iterator[None]:
    """As ops.kept.attend_kept; all seconds are booked as "far"."""
    assert all(x.stride(-1) == 1 for x in (q, k, v, out)), "the last dim is contiguous"
    most = MAX_LISTED // (reads.segment_size * len(k))
    for readers in reads.slices(min(most, max(1, -(-reads.num_tasks // num_pauses)))):
        with timed("far"):
            _attend(q, k, v, bits, reads, out, scale, readers)
        yield


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bits: Tensor, reads: Reads, out: Tensor, scale: float, readers: range
) -> None:
    """Some neighbouring readers."""
    tasks = range(reads.first_task[readers.start], reads.first_task[readers.stop])
    kept, tables, group = list_kept(bits, reads, tasks), reads.tensors(q.device), q.shape[1] // len(k)
    most = max(reads.readers[reader].num_rows for reader in readers)
    constants = attend_constants(q, most * group)
    attend_kernel[(-(-most * group // constants["ROWS"]), len(k), len(readers))](
        *(q, k, v, out, kept.rows, kept.first),
        *(tables.num_rows, tables.query_row, tables.key_row, tables.first_task),
        *(readers.start, tasks.start, len(tasks)),
        *(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2], scale / LN2),
        GROUP=group,
        **constants,
    )
