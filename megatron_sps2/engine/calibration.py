"""Budgets of CSA for a model, by layer and KV head: a wished share of the attention on a text must stay.

The model runs exactly; at each layer the probes select with every candidate budget, and queries that were no
probes say what it would have kept. Knows a model on one rank, no files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_sps2.attention.csa_plan import CsaPlan
from megatron_sps2.config import ModelConfig
from megatron_sps2.csa_setting import CsaSetting
from megatron_sps2.engine.trial import ExactStep, Trial
from megatron_sps2.ops import sparsity

# Candidates, rising; the last one keeps everything.
FLOORS = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.925, 0.95, 0.96, 0.97, 0.98, 0.99, 0.995, 0.998, 0.999, 1.0)
SHARES = (0.0, *(n / 64 for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)), 1.0)
# Distances of fixed budgets, in segments.
GROUP_SIZES = (1, 2, 4, 8)
# Queries of a reading segment that check what its probes chose.
NUM_HELD_OUT = 32

Progress = Callable[[], None]
FloatTable = tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What was chosen; tables are [layer][KV head], kept_mass that of held-out queries."""

    setting: CsaSetting
    kept_mass: FloatTable
    density: FloatTable


def base_setting(setting: CsaSetting, floor: float, *, adaptive: bool, segment_size: int) -> CsaSetting:
    """The scored setting whose budgets are to be found. Raises ValueError for a floor that is none."""
    if not 0 < floor <= 1:
        raise ValueError(
            f"floor={floor} must lie above 0 and at most at 1: it is the share of attention kept"
        )
    # Other segments than the usual ones are as wished; distances of fixed budgets are counted in segments.
    grows = adaptive and segment_size == setting.segment_size
    shape = replace(
        setting,
        name=f"calibrated-{floor:g}",
        selector="scored",
        segment_size=segment_size,
        max_segment_size=setting.max_segment_size if grows else None,
    )
    if adaptive:
        return replace(shape, floor=floor)
    return replace(shape, floor=None, group_sizes=GROUP_SIZES, degrees=(1,) * len(GROUP_SIZES))


def check_length(setting: CsaSetting, num_tokens: int, model: ModelConfig) -> None:
    """Raises ValueError for samples in which nothing can be measured."""
    segment_size = setting.for_prompt(num_tokens).segment_size
    least = segment_size + setting.tail + setting.num_probes + 1
    if not least <= num_tokens <= model.max_seq_len:
        raise ValueError(
            f"samples of {num_tokens} tokens: must be {least} (a segment of {segment_size}, queries "
            f"that read it, and the exact tail) to {model.max_seq_len} (what the model allows)"
        )


def calibrate(
    trial: Trial, samples: list[list[int]], base: CsaSetting, floor: float, progress: Progress = lambda: None
) -> Calibration:
    """Runs every sample; `progress` is called after each layer. `base` is what base_setting made."""
    tables = BudgetTables(base, trial.model)
    for number, token_ids in enumerate(samples):
        plan = CsaPlan(base, len(token_ids), 1)
        trial.hidden(token_ids, _MeasuringStep(plan, tables, number, progress))
    return tables.choose(floor)


class BudgetTables:
    """What every candidate drops and keeps, by layer, KV head and level; adaptive floors have one level."""

    def __init__(self, base: CsaSetting, model: ModelConfig) -> None:
        self.base = base
        self.candidates = FLOORS if base.is_adaptive else SHARES
        num_levels = 1 if base.is_adaptive else len(base.group_sizes) - 1
        shape = model.num_layers, model.num_query_groups, num_levels, len(self.candidates)
        self._dropped = torch.zeros(shape, dtype=torch.float64)  # share of held-out attention
        self._kept = torch.zeros(shape, dtype=torch.float64)  # keys
        self._far = torch.zeros(shape[:3], dtype=torch.float64)  # keys
        self._reads = torch.zeros(shape[:2], dtype=torch.float64)

    def add(
        self, layer: int, kv_head: int, reader: int, chosen_by: Tensor, held_out: Tensor, always: Tensor
    ) -> None:
        """One reader: the mass `[m, G]` that its probes and its held-out queries give to earlier keys."""
        levels = torch.tensor([self._level(reader, segment) for segment in range(reader)])
        place = layer, kv_head
        self._reads[place] += 1
        self._far[place].index_add_(0, levels, torch.full((reader,), float(always.shape[1])).double())
        for i, value in enumerate(self.candidates):
            kept = select(self.base, reader, chosen_by, always, value)
            dropped = held_out.masked_fill(kept, 0.0).sum(1, dtype=torch.float64)
            self._dropped[place][:, i].index_add_(0, levels, dropped)
            self._kept[place][:, i].index_add_(0, levels, kept.sum(1).double())

    def choose(self, floor: float) -> Calibration:
        """The fewest keys whose held-out mass, the mean over reads, reaches the floor."""
        layers, heads = self._reads.shape
        chosen = [[self._choose(layer, head, 1 - floor) for head in range(heads)] for layer in range(layers)]
        values = tuple(tuple(tuple(self.candidates[i] for i in at) for at in layer) for layer in chosen)
        setting = (
            replace(self.base, floors=tuple(tuple(head[0] for head in layer) for layer in values))
            if self.base.is_adaptive
            else replace(self.base, densities=values)
        )
        return Calibration(
            setting=setting,
            kept_mass=self._table(chosen, self.kept_mass),
            density=self._table(chosen, self.density),
        )

    def kept_mass(self, layer: int, kv_head: int, at: list[int]) -> float:
        """Of held-out queries with candidate at[l] on level l."""
        dropped = self._dropped[layer, kv_head, range(len(at)), at].sum() / self._reads[layer, kv_head]
        return 1 - float(dropped)

    def density(self, layer: int, kv_head: int, at: list[int]) -> float:
        kept = self._kept[layer, kv_head, range(len(at)), at].sum()
        return float(kept / self._far[layer, kv_head].sum())

    def _table(self, chosen: list[list[list[int]]], of: Callable[[int, int, list[int]], float]) -> FloatTable:
        return tuple(
            tuple(of(layer, head, at) for head, at in enumerate(heads)) for layer, heads in enumerate(chosen)
        )

    def _level(self, reader: int, segment: int) -> int:
        return 0 if self.base.is_adaptive else self.base.level_of(reader, segment) - 1

    def _choose(self, layer: int, kv_head: int, allowed: float) -> list[int]:
        """The candidate of each level. The level whose next one saves most attention a key goes first."""
        dropped, kept = self._dropped[layer, kv_head], self._kept[layer, kv_head]
        at, last = [0] * len(dropped), len(self.candidates) - 1
        while float(dropped[range(len(at)), at].sum()) > allowed * float(self._reads[layer, kv_head]):
            gains = {
                level: float(
                    (dropped[level, i] - dropped[level, i + 1]) / (kept[level, i + 1] - kept[level, i] + 1)
                )
                for level, i in enumerate(at)
                if i < last
            }
            at[max(gains, key=lambda level: gains[level])] += 1
        return at


def select(setting: CsaSetting, reader: int, mass: Tensor, always: Tensor, value: float) -> Tensor:
    """As CSA selects, with `value` as floor or as share of every segment: mass `[m, G]` -> bool `[m, G]`."""
    mass = mass.masked_fill(always, 0.0)  # what is kept anyway uses up no budget
    if setting.is_adaptive:
        return always | sparsity.above_floor(mass, value, reader)
    return always | sparsity.best(mass, [math.ceil(value * mass.shape[1])] * reader)


def held_out_rows(plan: CsaPlan, reader: int, seed: int) -> list[int]:
    """Rows of the reader, none of them a probe; the same for a seed."""
    probes = set(plan.probes(reader))
    others = [row for row in range(plan.num_rows(reader)) if row not in probes]
    generator = torch.Generator().manual_seed(seed * len(plan.segments) + reader)
    return sorted(others[i] for i in torch.randperm(len(others), generator=generator)[:NUM_HELD_OUT].tolist())


class _MeasuringStep:
    """Exact attention over one sample, each layer measured on the way."""

    def __init__(self, plan: CsaPlan, tables: BudgetTables, seed: int, progress: Progress) -> None:
        self._plan, self._tables, self._progress, self._exact = plan, tables, progress, ExactStep()
        self._held_out = {reader: held_out_rows(plan, reader, seed) for reader in plan.readers}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [s, 1, n, d], k and v [s, 1, n_kv, d] -> [s, 1, n, d]"""
        for reader in filter(self._held_out.get, self._plan.readers):
            for head, (queries, keys) in enumerate(zip(_grouped(q, k), k[:, 0].transpose(0, 1), strict=True)):
                self._measure(layer, head, reader, queries, keys.contiguous())
        self._progress()
        return self._exact.attend(layer, q, k, v)

    def _measure(self, layer: int, head: int, reader: int, queries: Tensor, keys: Tensor) -> None:
        """queries [s, g, d], keys [s, d] of one KV head."""
        setting, segment = self._plan.setting, self._plan.segments[reader]
        positions = torch.arange(segment.start).view(reader, setting.segment_size)
        always = sparsity.always_kept(positions, segment.start, setting.num_sinks, setting.window)
        chosen_by, held_out = (
            self._mass(reader, rows, queries, keys)
            for rows in (self._plan.probes(reader), self._held_out[reader])
        )
        self._tables.add(layer, head, reader, chosen_by, held_out, always)

    def _mass(self, reader: int, rows: list[int], queries: Tensor, keys: Tensor) -> Tensor:
        """[m, G]: the attention that rows of the reader pay to each earlier key, the mean over them."""
        start = self._plan.segments[reader].start
        own = keys[start : start + self._plan.num_rows(reader)]
        asking, scale = queries[[start + row for row in rows]], queries.shape[-1] ** -0.5
        scored = sparsity.score(asking.flatten(0, 1), keys[:start], self._plan.setting.segment_size, scale)
        sums = torch.stack([scored.log_sum(), sparsity.own_log_sum(asking, rows, own, scale)])
        return scored.mass(sparsity.total_log_sum(sums))


def _grouped(q: Tensor, k: Tensor) -> Tensor:
    """[s, 1, n, d] -> [n_kv, s, g, d]"""
    return q[:, 0].unflatten(1, (k.shape[2], -1)).transpose(0, 1)
