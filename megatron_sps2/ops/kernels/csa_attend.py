"""CSA's attention: all segments and heads in one launch, kept keys gathered from where they lie.

A tile of queries goes through its reader's kept keys and then through its own segment, with one running
softmax: no partial result is stored, none merged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext

import triton
import triton.language as tl
from torch import Tensor

from megatron_sps2.ops.kept import Timed
from megatron_sps2.ops.kernels.csa_list import list_kept
from megatron_sps2.ops.kernels.csa_tiles import attend_constants
from megatron_sps2.ops.reads import Reads
from megatron_sps2.ops.tile import LN2

# Kept keys listed at a time, over heads: 256 MiB of rows where all are kept.
MAX_LISTED = 2**26


@triton.jit
def row_of(index, kept, num_kept, own, last):
    """Rows of k and v int64: kept keys come first, the own segment's follow. Beyond these, some row of it."""
    listed = tl.load(kept + index, mask=index < num_kept, other=0)
    return tl.where(index < num_kept, listed, tl.minimum(own + index - num_kept, last)).to(tl.int64)


@triton.jit
def add_tile(
    queries, keys, values, row, seen, stride_k, stride_v, scale_log2, acc, top, total,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The softmax's state (acc, top, total) after the keys in `row` `[KEYS]`; where MASKED, those `seen`.

    `seen` `[ROWS, KEYS]`. Each row sees the very first key, so that the top is a number from there on.
    """
    dim = tl.arange(0, BLOCK_D)
    k_at = keys + row[None, :] * stride_k + dim[:, None]
    v_at = values + row[:, None] * stride_v + dim[None, :]
    if D == BLOCK_D:
        k, v = tl.load(k_at), tl.load(v_at)
    else:
        k = tl.load(k_at, mask=(dim < D)[:, None], other=0.0)
        v = tl.load(v_at, mask=(dim < D)[None, :], other=0.0)
    if UPCAST:
        k, v = k.to(tl.float32), v.to(tl.float32)
    scores = tl.dot(queries, k, input_precision=PRECISION)
    if MASKED:
        scores = tl.where(seen, scores, -float("inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * scale_log2)
    weights = tl.exp2(scores * scale_log2 - higher[:, None])
    past = tl.exp2(top - higher)
    acc = tl.dot(weights.to(v.dtype), v, acc * past[:, None], input_precision=PRECISION)
    return acc, higher, total * past + tl.sum(weights, 1)


@triton.jit
def attend_kernel(
    q, k, v, out, rows, first, num_rows, query_row, key_row, first_task,
    first_reader, first_listed, num_listed,
    stride_qs, stride_qn, stride_kh, stride_ks, stride_vh, stride_vs, stride_os, stride_on, scale_log2,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q, out `[s, n, d]`, k, v `[n_kv, s, d]`; rows and first as KeptRows has them.

    A program's rows are one query of one head each: the GROUP heads that share a KV head lie side by side.
    """
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

    # A row sees its reader's kept keys and, following on, the own segment's keys up to itself.
    listed = first + head * num_listed - first_listed
    begin = tl.load(listed + tl.load(first_task + reader))
    num_kept = (tl.load(listed + tl.load(first_task + reader + 1)) - begin).to(tl.int32)
    kept = rows + begin
    own = tl.load(key_row + reader)
    last = own + count - 1
    visible = num_kept + tl.minimum(query, count - 1) + 1
    clear = num_kept // KEYS * KEYS  # keys of whole tiles that all rows see
    stop = num_kept + tl.minimum(count, (tl.program_id(0) * ROWS + ROWS - 1) // GROUP + 1)
    for low in range(0, clear, KEYS):
        place = tl.load(kept + low + key).to(tl.int64)
        acc, top, total = add_tile(
            queries, keys, values, place, None, stride_ks, stride_vs, scale_log2, acc, top, total,
            False, D, BLOCK_D, UPCAST, PRECISION,
        )  # fmt: skip
    for low in range(clear, stop, KEYS):
        place = row_of(low + key, kept, num_kept, own, last)
        seen = (low + key)[None, :] < visible[:, None]
        acc, top, total = add_tile(
            queries, keys, values, place, seen, stride_ks, stride_vs, scale_log2, acc, top, total,
            True, D, BLOCK_D, UPCAST, PRECISION,
        )  # fmt: skip
    to = out + (line * stride_os + q_head * stride_on)[:, None] + dim[None, :]
    tl.store(to, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)


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
