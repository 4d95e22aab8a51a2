"""One rank's part in a prompt's CSA: which keys it scores, for whom, and where what travels belongs.

Plain integers made once for a prompt, and index tensors of them on its device: no layer waits for the host to
count, and no step loops over readers. Knows the plan, sends nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from megatron_sps2.attention.csa_plan import CsaPlan
from megatron_sps2.ops.reads import Reader, Reads


@dataclass(frozen=True)
class CsaRoutes:
    """Seen from `rank`. Readers that keys here are scored for stand rank after rank, rising within one."""

    plan: CsaPlan
    rank: int
    device: torch.device

    @cached_property
    def asking(self) -> list[list[int]]:
        """By rank: its readers whose probes come here; of this rank all."""
        plan, me = self.plan, self.rank
        return [
            [r for r in plan.readers_of(rank) if rank == me or plan.num_past(me, r)]
            for rank in range(plan.num_ranks)
        ]

    @cached_property
    def scoring(self) -> Reads:
        """This rank's keys in their order here, and all that read them."""
        plan, me = self.plan, self.rank
        readers = [
            self._reader(r, plan.held[me][: plan.num_past(me, r)], self.offset(r) if rank == me else None)
            for rank, asking in enumerate(self.asking)
            for r in asking
        ]
        return Reads(plan.setting.segment_size, tuple(plan.held[me]), tuple(readers))

    @cached_property
    def attending(self) -> Reads:
        """Keys by position, and all segments here that have queries."""
        plan, size = self.plan, self.plan.setting.segment_size
        readers = [
            self._reader(r, list(range(r)), r * size) for r in plan.held[self.rank] if plan.num_rows(r)
        ]
        past = max((reader.number for reader in readers), default=0)
        return Reads(size, tuple(range(past)), tuple(readers))

    def _reader(self, number: int, past: list[int], key_row: int | None) -> Reader:
        plan = self.plan
        return Reader(
            number=number,
            levels=tuple(plan.setting.level_of(number, segment) for segment in past),
            num_rows=plan.num_rows(number),
            probes=tuple(plan.probes(number)) if number else (),
            query_row=None if key_row is None else self.offset(number),
            key_row=key_row,
        )

    def offset(self, segment: int) -> int:
        """Where a segment of this rank begins in its rows: those before it are whole."""
        return self.plan.num_past(self.rank, segment) * self.plan.setting.segment_size

    @cached_property
    def num_laid_out(self) -> int:
        """Keys by position up to the last that a query here sees."""
        size = self.plan.setting.segment_size
        return max((r.number * size + r.num_rows for r in self.attending.readers), default=0)

    @cached_property
    def probes_from(self) -> list[slice]:
        """By rank: its probes among all that are scored here."""
        return self._blocks(self.scoring.first_probe)

    @cached_property
    def tasks_of(self) -> list[slice]:
        """By rank: the tasks of its readers among all that are scored here."""
        return self._blocks(self.scoring.first_task)

    def _blocks(self, first: list[int]) -> list[slice]:
        found, stop = [], 0
        for asking in self.asking:
            start, stop = stop, stop + len(asking)
            found.append(slice(first[start], first[stop]))
        return found

    @cached_property
    def own_probes(self) -> Tensor:
        """int64: rows of q that probe."""
        return self.scoring.tensors(self.device).probe_query[self.probes_from[self.rank]]

    def probes_to(self, rank: int) -> slice:
        """Of this rank's probes those that `rank` scores: its past begins at some reader and goes on."""
        mine = self.asking[self.rank]
        without = sum(
            len(self.plan.probes(r)) for r in mine if rank != self.rank and not self.plan.num_past(rank, r)
        )
        return slice(without, sum(len(self.plan.probes(r)) for r in mine))

    @cached_property
    def shared_probes(self) -> list[Tensor]:
        """By rank, int64: probes scored here whose sums that rank needs, and it has the same ones for us."""
        plan, place = self.plan, {reader.number: i for i, reader in enumerate(self.scoring.readers)}
        return [
            self._indices(
                [
                    probe
                    for r in plan.readers
                    if plan.concerns(self.rank, r) and plan.concerns(rank, r)
                    for probe in range(*self.scoring.probes(place[r]).indices(self.scoring.num_probes))
                ]
            )
            for rank in range(plan.num_ranks)
        ]

    @cached_property
    def arriving_tasks(self) -> list[Tensor]:
        """By rank, int64: among `attending` the tasks whose keys lie there, in the order that it has them."""
        plan, attending = self.plan, self.attending
        return [
            self._indices(
                [
                    attending.first_task[i] + segment
                    for i, reader in enumerate(attending.readers)
                    for segment in plan.held[rank][: plan.num_past(rank, reader.number)]
                ]
            )
            for rank in range(plan.num_ranks)
        ]

    @cached_property
    def slots(self) -> list[int]:
        """By rank, and in all: how many segments those before it hold."""
        found = [0]
        for held in self.plan.held:
            found.append(found[-1] + len(held))
        return found

    @cached_property
    def leaving_slots(self) -> Tensor:
        """By task of `scoring`, int64: (its reader's rank, its segment here), counted as one number."""
        num_held = len(self.plan.held[self.rank])
        owners = [rank for rank, asking in enumerate(self.asking) for _ in asking]
        return self._indices(
            [
                owner * num_held + segment
                for owner, reader in zip(owners, self.scoring.readers, strict=True)
                for segment in range(reader.num_past)
            ]
        )

    @cached_property
    def arriving_slots(self) -> Tensor:
        """By task of `attending`, int64: its segment, counted rank after rank."""
        place = {
            segment: self.slots[rank] + i
            for rank, held in enumerate(self.plan.held)
            for i, segment in enumerate(held)
        }
        return self._indices([place[s] for reader in self.attending.readers for s in range(reader.num_past)])

    @cached_property
    def slot_starts(self) -> Tensor:
        """By segment, counted rank after rank, int64: its first position."""
        size = self.plan.setting.segment_size
        return self._indices([segment * size for held in self.plan.held for segment in held])

    def _indices(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)
