"""How CSA's probes see keys: log2 sums for all readers and heads at once. Stores no weight of any key.

One program for a task (an earlier segment and its reader), a KV head and a block of probes; then one for a
reader adds its segments up in fp64. Each segment's sum is by itself, so that rounding hardly tells which rank
holds which.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_sps2.ops.kept import ProbeSums
from megatron_sps2.ops.kernels.csa_tiles import ProbeTiles
from megatron_sps2.ops.reads import Reads, ReadTensors
from megatron_sps2.ops.tile import LN2

# Segments of a reader that are added up at a time.
SEGMENTS = 16


@triton.jit
def load_probes(
    probes, first_probe, reader, head, block, stride_p, stride_n,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, PROBES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Some rows of a reader and KV head, `[PROBES, BLOCK_D]`: row r is probe r // GROUP, head r % GROUP."""
    first = tl.load(first_probe + reader)
    count = (tl.load(first_probe + reader + 1) - first) * GROUP
    row = block * PROBES + tl.arange(0, PROBES)
    dim = tl.arange(0, BLOCK_D)
    at = (first + row // GROUP).to(tl.int64) * stride_p + (head * GROUP + row % GROUP) * stride_n
    x = tl.load(probes + at[:, None] + dim, mask=(row < count)[:, None] & (dim < D), other=0.0)
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def score_kernel(
    probes, k, tops, sums, first_probe, probe_row, task_reader, key_row, num_rows,
    stride_p, stride_n, stride_h, stride_s, segment_size, padded, scale_log2,
    OWN: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PROBES: tl.constexpr, KEYS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """tops, sums fp32 `[n_kv, tasks, padded]`: base 2, of one segment's keys.

    OWN: tasks are the readers, whose probes see their segment up to themselves.
    """
    task, head, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(key_row + task)
    if OWN:
        if first < 0:
            return
        reader, stop = task, tl.load(num_rows + task)
    else:
        reader, stop = tl.load(task_reader + task), segment_size
    row = block * PROBES + tl.arange(0, PROBES)
    q = load_probes(
        probes, first_probe, reader, head, block, stride_p, stride_n, GROUP, D, BLOCK_D, PROBES, UPCAST
    )
    start, end = tl.load(first_probe + reader), tl.load(first_probe + reader + 1)
    place = tl.load(probe_row + start + row // GROUP, mask=start + row // GROUP < end, other=0)
    dim = tl.arange(0, BLOCK_D)
    keys = k + head.to(tl.int64) * stride_h + first.to(tl.int64) * stride_s
    top = tl.full([PROBES], -float("inf"), tl.float32)
    total = tl.zeros([PROBES], tl.float32)
    for low in range(0, stop, KEYS):
        key = low + tl.arange(0, KEYS)
        inside = (key < stop)[None, :] & (dim < D)[:, None]
        tile = tl.load(keys + dim[:, None] + key[None, :] * stride_s, mask=inside, other=0.0)
        if UPCAST:
            tile = tile.to(tl.float32)
        scores = tl.dot(q, tile, input_precision=PRECISION) * scale_log2
        seen = key[None, :] <= place[:, None] if OWN else (key < stop)[None, :]
        scores = tl.where(seen, scores, -float("inf"))
        # Every probe sees the first key: from the first tile on the top is finite.
        higher = tl.maximum(top, tl.max(scores, 1))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(scores - higher[:, None]), 1)
        top = higher
    at = (head.to(tl.int64) * tl.num_programs(0) + task) * padded + row
    tl.store(tops + at, top)
    tl.store(sums + at, total)


@triton.jit
def add_up_kernel(
    tops, sums, own_tops, own_sums, here, own, first_probe, first_task, key_row,
    num_tasks, num_probes, padded, GROUP: tl.constexpr, PROBES: tl.constexpr, SEGMENTS: tl.constexpr,
):  # fmt: skip
    """here, own fp64 `[n_kv, probes, g]`: log2 sums of what probes see here, and in their own segment."""
    reader, head, block = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    row = block * PROBES + tl.arange(0, PROBES)
    first, stop = tl.load(first_task + reader), tl.load(first_task + reader + 1)
    top = tl.full([PROBES], -float("inf"), tl.float64)
    total = tl.zeros([PROBES], tl.float64)
    for low in range(first, stop, SEGMENTS):
        task = low + tl.arange(0, SEGMENTS)
        at = (head * num_tasks + task)[:, None] * padded + row[None, :]
        inside = (task < stop)[:, None] & (row >= 0)[None, :]
        logs = tl.log2(tl.load(sums + at, mask=inside, other=1.0).to(tl.float64))
        logs += tl.load(tops + at, mask=inside, other=-float("inf")).to(tl.float64)
        higher = tl.maximum(top, tl.max(logs, 0))
        total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(logs - higher[None, :]), 0)
        top = higher
    at = (head * tl.num_programs(0) + reader) * padded + row
    own_log = tl.full([PROBES], -float("inf"), tl.float64)
    if tl.load(key_row + reader) >= 0:
        own_log = tl.log2(tl.load(own_sums + at).to(tl.float64)) + tl.load(own_tops + at).to(tl.float64)
    higher = tl.maximum(top, own_log)
    # A reader without anything here has no task: -inf - -inf would be NaN.
    shift = tl.where(higher == -float("inf"), 0.0, higher)
    total = total * tl.exp2(top - shift) + tl.exp2(own_log - shift)
    begin = tl.load(first_probe + reader)
    count = (tl.load(first_probe + reader + 1) - begin) * GROUP
    at = (head * num_probes + begin) * GROUP + row
    tl.store(here + at, shift + tl.log2(total), mask=row < count)
    tl.store(own + at, own_log, mask=row < count)


def score_probes(probes: Tensor, k: Tensor, reads: Reads, scale: float) -> ProbeSums:
    """probes `[probes, n, d]`, k `[n_kv, s, d]` -> `ProbeSums`."""
    assert probes.stride(-1) == k.stride(-1) == 1, "the last dim is contiguous"
    n_kv, group = len(k), probes.shape[1] // len(k)
    tables, tiles = reads.tensors(k.device), ProbeTiles.of(probes, reads, group)
    num_tasks, num_readers = reads.num_tasks, len(reads.readers)
    past, own = (
        torch.empty(2, n_kv, count, tiles.padded, dtype=torch.float32, device=k.device)
        for count in (num_tasks, num_readers)
    )
    _score(probes, k, past, reads, tables, tiles, scale, own=False)
    _score(probes, k, own, reads, tables, tiles, scale, own=True)
    here, mine = torch.empty(2, n_kv, len(probes), group, dtype=torch.float64, device=k.device)
    if num_readers:
        add_up_kernel[(num_readers, n_kv, tiles.num_blocks)](
            *(*past, *own, here, mine, tables.first_probe, tables.first_task, tables.key_row),
            *(num_tasks, len(probes), tiles.padded),
            GROUP=group,
            PROBES=tiles.probes,
            SEGMENTS=SEGMENTS,
        )
    return ProbeSums(here, mine)


def _score(
    probes: Tensor,
    k: Tensor,
    found: Tensor,
    reads: Reads,
    tables: ReadTensors,
    tiles: ProbeTiles,
    scale: float,
    *,
    own: bool,
) -> None:
    """Fills found fp32 `[2, n_kv, tasks or readers, padded]`, tops and sums."""
    count = found.shape[2]
    rows: dict[str, Any] = {"key_row": tables.key_row if own else tables.task_row, "OWN": own}
    if count:
        score_kernel[(count, len(k), tiles.num_blocks)](
            *(probes, k, *found, tables.first_probe, tables.probe_row, tables.task_reader),
            num_rows=tables.num_rows,
            stride_p=probes.stride(0),
            stride_n=probes.stride(1),
            stride_h=k.stride(0),
            stride_s=k.stride(1),
            segment_size=reads.segment_size,
            padded=tiles.padded,
            scale_log2=scale / LN2,
            GROUP=probes.shape[1] // len(k),
            **tiles.constants,
            **rows,
        )
