"""CSA's three steps on one rank: probes score keys, keys are kept, queries attend to what was kept.

Reader by reader and head by head: runs anywhere, and is what ops.kernels is held against. Kept keys are bits,
uint8 `[n_kv, tasks, G / 8]` as pack_bits gives them; tasks are those of `Reads`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_sps2.ops import sparsity
from megatron_sps2.ops.attend import attend
from megatron_sps2.ops.keep_rule import KeepRule
from megatron_sps2.ops.reads import Reader, Reads

Timed = Callable[[str], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class ProbeSums:
    """float64 `[n_kv, probes, g]`: log2 of the sums of what each probe sees here, and in its own segment.

    -inf where that is nothing, as where the own segment is not here.
    """

    here: Tensor
    own: Tensor


@dataclass(frozen=True, slots=True)
class Kept:
    """What all readers keep here, and by KV head, over readers: how many keys, what share of attention.

    bits uint8 `[n_kv, tasks, G / 8]`, num_kept int64 `[n_kv]`, mass float64 `[n_kv]` (None: nothing probed).
    """

    bits: Tensor
    num_kept: Tensor
    mass: Tensor | None


class KeySelector(Protocol):
    """Chooses among the keys of earlier segments that lie here; one for each layer and head chunk."""

    def __init__(self, k: Tensor, reads: Reads, scale: float) -> None:
        """k `[n_kv, s, d]`, the last dim contiguous."""
        ...

    def score(self, probes: Tensor) -> ProbeSums:
        """probes `[probes, n, d]`, reader after reader. Call it before `select`, where anything probes."""
        ...

    def select(self, totals: Tensor | None, rule: KeepRule) -> Kept:
        """totals float64 `[n_kv, probes, g]`: the probes' log2 sums over all that they see, anywhere.

        Call it once, last; None where nothing probed.
        """
        ...


class TorchSelector:
    """As KeySelector says. Holds every probe's weight of every key from `score` to `select`."""

    def __init__(self, k: Tensor, reads: Reads, scale: float) -> None:
        self._k, self._reads, self._scale = k, reads, scale
        self._scored: list[list[sparsity.Scored]] = []  # by reader and head

    def score(self, probes: Tensor) -> ProbeSums:
        keys = self._k.float()  # once, not for every reader
        n_kv, group = len(keys), probes.shape[1] // len(keys)
        here = probes.new_full((n_kv, len(probes), group), -torch.inf, dtype=torch.float64)
        own = here.clone()
        for i, reader in enumerate(self._reads.readers):
            rows = self._reads.probes(i)
            grouped = probes[rows].unflatten(1, (n_kv, group)).transpose(0, 1)  # [n_kv, probes, g, d]
            here[:, rows] = self._score_past(reader, grouped, keys).unflatten(1, (-1, group))
            if reader.key_row is not None:
                own[:, rows] = self._score_own(reader, grouped, keys).unflatten(1, (-1, group))
                here[:, rows] = sparsity.total_log_sum(torch.stack([here[:, rows], own[:, rows]]))
        return ProbeSums(here, own)

    def _score_past(self, reader: Reader, probes: Tensor, keys: Tensor) -> Tensor:
        size = self._reads.segment_size
        past = keys[:, : reader.num_past * size]
        scored = [
            sparsity.score(own.flatten(0, 1), k, size, self._scale)
            for own, k in zip(probes, past, strict=True)
        ]
        self._scored.append(scored)
        return torch.stack([head.log_sum() for head in scored])

    def _score_own(self, reader: Reader, probes: Tensor, keys: Tensor) -> Tensor:
        assert reader.key_row is not None, "whoever asks has seen to it"
        own = keys[:, reader.key_row : reader.key_row + reader.num_rows]
        return torch.stack(
            [sparsity.own_log_sum(p, reader.probes, k, self._scale) for p, k in zip(probes, own, strict=True)]
        )

    def select(self, totals: Tensor | None, rule: KeepRule) -> Kept:
        reads, n_kv = self._reads, len(self._k)
        bits = self._k.new_empty((n_kv, reads.num_tasks, reads.segment_size // 8), dtype=torch.uint8)
        counts = self._k.new_zeros(n_kv, dtype=torch.int64)
        masses = None if totals is None else self._k.new_zeros(n_kv, dtype=torch.float64)
        for i, reader in enumerate(reads.readers):
            if not reader.num_past:
                continue
            positions = positions_of(reads, reader, self._k.device)
            first = reader.number * reads.segment_size
            always = sparsity.always_kept(positions, first, rule.num_sinks, rule.window)
            for head in range(n_kv):
                mass = None
                if totals is not None:
                    mass = self._scored[i][head].mass(totals[head, reads.probes(i)].flatten())
                kept = always | by_rule(rule, reader, head, positions, mass, always)
                bits[head, reads.tasks(i)] = sparsity.pack_bits(kept)
                counts[head] += kept.sum()
                if masses is not None and mass is not None:
                    masses[head] += mass[kept].sum()
        self._scored.clear()  # the largest thing here
        return Kept(bits, counts, masses)


def positions_of(reads: Reads, reader: Reader, device: torch.device) -> Tensor:
    """Of the keys of its earlier segments here: `[m, G]`."""
    past = torch.tensor(reads.held[: reader.num_past], device=device)
    return past[:, None] * reads.segment_size + torch.arange(reads.segment_size, device=device)


def by_rule(
    rule: KeepRule, reader: Reader, head: int, positions: Tensor, mass: Tensor | None, always: Tensor
) -> Tensor:
    """What a reader keeps of one head's keys: positions, mass and always `[m, G]` -> bool `[m, G]`."""
    if rule.kind == "none":
        return always
    budgets = rule.of(head, reader.levels)
    if rule.kind == "strided":
        return sparsity.strided(positions, budgets, rule.first_head + head)
    assert mass is not None, "budgets by score need probes"
    mass = mass.masked_fill(always, 0.0)  # what is kept anyway uses up no budget
    if rule.kind == "floor":
        return sparsity.above_floor(mass, budgets[0], reader.number)
    return sparsity.best(mass, [int(count) for count in budgets])


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
    """Fills out `[s, n, d]` with what the readers' queries see: their own segment, causally, and kept keys.

    q `[s, n, d]`; k, v `[n_kv, s, d]`: earlier segments, own keys among them. Pauses about `num_pauses` times
    or oftener (here after each reader), so that other work can be done meanwhile. Seconds are booked as
    "local" and "far" where the two can be told apart.
    """
    for i, reader in enumerate(reads.readers):
        assert reader.query_row is not None and reader.key_row is not None, "readers that are here"
        rows = slice(reader.query_row, reader.query_row + reader.num_rows)
        keys = slice(reader.key_row, reader.key_row + reader.num_rows)
        with timed("local"):
            own, own_lse = _attend_own(q[rows], k[:, keys], v[:, keys], scale)
        with timed("far"):
            if not reader.num_past:
                out[rows] = own
            else:
                kept = sparsity.unpack_bits(bits[:, reads.tasks(i)]).flatten(1)  # [n_kv, keys]
                _add_far(q[rows], k, v, kept, own, own_lse, out[rows], scale)
        yield


def _attend_own(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q [s, n, d], k and v [n_kv, s, d] -> out [s, n, d], lse [s, n]; causal."""
    keys, values = (x.transpose(0, 1).unsqueeze(1) for x in (k, v))
    out, lse = attend(q.unsqueeze(1), keys, values, scale=scale, diagonal=0)
    return out[:, 0], lse[:, 0]


def _add_far(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, own: Tensor, own_lse: Tensor, out: Tensor, scale: float
) -> None:
    """Own (out, lse) merged with attention to the kept keys, all in the past, into `out` [s, n, d]."""
    group = q.shape[1] // len(k)
    for head, mask in enumerate(kept):
        heads, at = slice(head * group, (head + 1) * group), mask.nonzero().squeeze(1)
        keys, values = (x[head].index_select(0, at)[:, None, None] for x in (k, v))
        far, far_lse = attend(q[:, None, heads], keys, values, scale=scale, diagonal=None)
        # Two parts, of which the own is never empty: out = own + w (far - own), as ops.merge gives it.
        weight = torch.sigmoid(far_lse[:, 0] - own_lse[:, heads]).unsqueeze(-1)
        out[:, heads] = own[:, heads].float().lerp_(far[:, 0].float(), weight)
