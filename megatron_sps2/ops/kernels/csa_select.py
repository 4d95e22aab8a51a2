"""Which keys CSA's readers keep: each key's share of the probes' attention, then a threshold for a segment.

The threshold is found by halving the range of the floats' bit patterns, which for shares are in the floats'
order: nothing is sorted. Shares lie in memory for some neighbouring readers at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_sps2.ops.keep_rule import KeepRule
from megatron_sps2.ops.kept import Kept, ProbeSums
from megatron_sps2.ops.kernels.csa_score import load_probes, score_probes
from megatron_sps2.ops.kernels.csa_tiles import ProbeTiles, power_of_two
from megatron_sps2.ops.reads import Reads
from megatron_sps2.ops.tile import LN2

# Shares at a time, over heads: 256 MiB of them.
MAX_SHARES = 2**26
KINDS = {"none": 0, "strided": 1, "floor": 2, "best": 3}


@triton.jit
def mass_kernel(
    probes, k, totals, mass, first_probe, task_reader, task_row, first_task, num_probes,
    stride_p, stride_n, stride_h, stride_s, segment_size, scale_log2,
    NUM_BLOCKS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    PROBES: tl.constexpr, KEYS: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """mass fp32 `[n_kv, tasks, G]`, tasks from `first_task` on: the mean over probes of 2^(score - total)."""
    task, head = first_task + tl.program_id(0), tl.program_id(1)
    reader = tl.load(task_reader + task)
    begin = tl.load(first_probe + reader)
    count = (tl.load(first_probe + reader + 1) - begin) * GROUP
    dim, row = tl.arange(0, BLOCK_D), tl.arange(0, PROBES)
    sums = totals + (head.to(tl.int64) * num_probes + begin) * GROUP
    keys = k + head.to(tl.int64) * stride_h + tl.load(task_row + task).to(tl.int64) * stride_s
    place = mass + (head.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * segment_size
    # Where one block is all, as usual, it stays for all keys.
    q = load_probes(
        probes, first_probe, reader, head, 0, stride_p, stride_n, GROUP, D, BLOCK_D, PROBES, UPCAST
    )
    for low in range(0, segment_size, KEYS):
        key = low + tl.arange(0, KEYS)
        inside = (key < segment_size)[:, None] & (dim < D)[None, :]
        tile = tl.load(keys + key[:, None] * stride_s + dim[None, :], mask=inside, other=0.0)
        if UPCAST:
            tile = tile.to(tl.float32)
        share = tl.zeros([KEYS], tl.float32)
        for block in tl.static_range(NUM_BLOCKS):
            if NUM_BLOCKS > 1:
                q = load_probes(
                    probes, first_probe, reader, head, block,
                    stride_p, stride_n, GROUP, D, BLOCK_D, PROBES, UPCAST,
                )  # fmt: skip
            # In two fp32 parts: scores of some hundreds leave an fp32 total few digits behind the point.
            at = block * PROBES + row
            total = tl.load(sums + at, mask=at < count, other=0.0)
            high = total.to(tl.float32)
            rest = (total - high.to(tl.float64)).to(tl.float32)
            scores = tl.dot(tile, tl.trans(q), input_precision=PRECISION) * scale_log2
            shares = tl.exp2((scores - high[None, :]) - rest[None, :])
            share += tl.sum(tl.where((at < count)[None, :], shares, 0.0), 1)
        tl.store(place + key, share / count, mask=key < segment_size)


@triton.jit
def choose_kernel(
    mass, limits, bits, counts, kept_mass, task_reader, task_position, start,
    first_task, num_tasks, segment_size, num_sinks, window, first_head,
    KIND: tl.constexpr, HAS_MASS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """mass `[n_kv, tasks of this call, G]`, and of all tasks: limits and kept_mass fp64, counts int32 `[n_kv,
    num_tasks]`, bits uint8 `[n_kv, num_tasks, G / 8]`.
    """
    task, head = first_task + tl.program_id(0), tl.program_id(1)
    at = head.to(tl.int64) * num_tasks + task
    offset = tl.arange(0, SIZE)
    inside = offset < segment_size
    position = tl.load(task_position + task) + offset
    reader_start = tl.load(start + tl.load(task_reader + task))
    always = (position < num_sinks) | (position >= reader_start - window)
    share = tl.zeros([SIZE], tl.float32)
    if HAS_MASS:
        here = mass + (head.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * segment_size
        share = tl.load(here + offset, mask=inside, other=0.0)
    keep = always
    if KIND == 1:
        step = tl.load(limits + at).to(tl.int32)
        keep = always | (position % step == (first_head + head) % step)
    if KIND >= 2:
        keep = always | _worth_it(tl.where(always, 0.0, share), inside, tl.load(limits + at), KIND)
    keep = keep & inside
    byte = tl.sum(tl.reshape(keep.to(tl.int32) << (offset % 8), [SIZE // 8, 8]), 1)
    place = tl.arange(0, SIZE // 8)
    tl.store(bits + at * (segment_size // 8) + place, byte.to(tl.uint8), mask=place < segment_size // 8)
    tl.store(counts + at, tl.sum(keep.to(tl.int32), 0))
    if HAS_MASS:
        tl.store(kept_mass + at, tl.sum(tl.where(keep, share, 0.0).to(tl.float64), 0))


@triton.jit
def _worth_it(share, inside, limit, KIND: tl.constexpr):
    """Shares from the least v on such that what is not above v weighs more than `limit`; none without such v.

    A share weighs itself (KIND 2, a floor) or 1 (KIND 3, a count). No share of 0 is worth it, but where
    nothing may be left out (a limit not above 0) all are.
    """
    pattern = share.to(tl.int32, bitcast=True)
    weight = share.to(tl.float64)
    if KIND == 3:
        weight = tl.full(share.shape, 1.0, tl.float64)
    weight = tl.where(inside, weight, 0.0)
    low, high = 0, 0x7F800000  # infinity
    for _ in range(31):
        middle = low + (high - low) // 2
        enough = tl.sum(tl.where(pattern <= middle, weight, 0.0), 0) > limit
        # Once the two meet, nothing changes any more.
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, tl.minimum(middle + 1, high))
    return (pattern >= high) & (pattern > tl.where(limit > 0, 0, -1))


class TritonSelector:
    """As ops.kept.KeySelector says. Holds the probes from `score` to `select`, and scores keys anew there."""

    def __init__(self, k: Tensor, reads: Reads, scale: float) -> None:
        self._k, self._reads, self._scale = k, reads, scale
        self._probes: Tensor | None = None

    def score(self, probes: Tensor) -> ProbeSums:
        self._probes = probes
        return score_probes(probes, self._k, self._reads, self._scale)

    def select(self, totals: Tensor | None, rule: KeepRule) -> Kept:
        reads, device = self._reads, self._k.device
        shape = len(self._k), reads.num_tasks
        bits = torch.empty(*shape, reads.segment_size // 8, dtype=torch.uint8, device=device)
        counts = torch.empty(shape, dtype=torch.int32, device=device)
        masses = torch.empty(shape, dtype=torch.float64, device=device)
        limits = limits_of(rule, reads, device)
        for readers in reads.slices(MAX_SHARES // (reads.segment_size * len(self._k))):
            tasks = range(reads.first_task[readers.start], reads.first_task[readers.stop])
            if len(tasks):
                mass = None if totals is None else self._mass(totals, tasks)
                choose(mass, limits, rule, reads, tasks, (bits, counts, masses))
        return Kept(bits, counts.sum(1), None if totals is None else masses.sum(1))

    def _mass(self, totals: Tensor, tasks: range) -> Tensor:
        """Shares fp32 `[n_kv, tasks, G]`."""
        probes, k, reads = self._probes, self._k, self._reads
        assert probes is not None, "score comes before select"
        group = probes.shape[1] // len(k)
        tiles, tables = ProbeTiles.of(probes, reads, group), reads.tensors(k.device)
        mass = torch.empty(len(k), len(tasks), reads.segment_size, dtype=torch.float32, device=k.device)
        mass_kernel[(len(tasks), len(k))](
            *(probes, k, totals.contiguous(), mass),
            *(tables.first_probe, tables.task_reader, tables.task_row, tasks.start, len(probes)),
            *(*probes.stride()[:2], *k.stride()[:2], reads.segment_size, self._scale / LN2),
            NUM_BLOCKS=tiles.num_blocks,
            GROUP=group,
            **tiles.constants,
        )
        return mass


def choose(
    mass: Tensor | None,
    limits: Tensor,
    rule: KeepRule,
    reads: Reads,
    tasks: range,
    found: tuple[Tensor, Tensor, Tensor],
) -> None:
    """mass fp32 `[n_kv, len(tasks), G]` -> these tasks' places in bits, counts and kept mass of all tasks."""
    bits, _, _ = found
    tables = reads.tensors(bits.device)
    choose_kernel[(len(tasks), len(bits))](
        *(bits if mass is None else mass, limits, *found),
        *(tables.task_reader, tables.task_position, tables.start),
        *(tasks.start, reads.num_tasks, reads.segment_size, rule.num_sinks, rule.window, rule.first_head),
        KIND=KINDS[rule.kind],
        HAS_MASS=mass is not None,
        SIZE=power_of_two(reads.segment_size),
    )


def limits_of(rule: KeepRule, reads: Reads, device: torch.device) -> Tensor:
    """fp64 `[n_kv, tasks]`: strides, or what may be left out of a task's segment."""
    tables, budgets = reads.tensors(device), rule.budgets
    alike = budgets.shape[1] == 1
    by_task = budgets.expand(-1, reads.num_tasks) if alike else budgets.index_select(1, tables.task_level)
    if rule.kind == "floor":
        return torch.where(by_task >= 1, -1.0, (1 - by_task) / tables.task_number)
    return (reads.segment_size - by_task if rule.kind == "best" else by_task).contiguous()
