"""One rank's part in a prompt's CSA: which keys it scores, for whom, and where what travels belongs.

Plain integers made once for a prompt, and index tensors of them on its device: no layer waits for the host to
count, and no step loops over readers. Knows the plan, sends nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from megatron_sps2.attention.csa_plan import CsaPlan
from megatron_sps2.ops.pack import Parcels
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
    def leaving(self) -> Parcels:
        """What its segments send, by rank of the reader and then by segment; nothing goes to this rank."""
        size, mine = self.plan.setting.segment_size, self.plan.held[self.rank]
        wanted: list[list[int]] = [[] for _ in range(self.plan.num_ranks * len(mine))]
        owners = [rank for rank, asking in enumerate(self.asking) for _ in asking]
        for i, (owner, reader) in enumerate(zip(owners, self.scoring.readers, strict=True)):
            for segment in range(reader.num_past if owner != self.rank else 0):
                wanted[owner * len(mine) + segment].append(self.scoring.first_task[i] + segment)
        rows = [segment * size for segment in range(len(mine))] * self.plan.num_ranks
        return Parcels.of(wanted, rows, self.device)

    @cached_property
    def arriving(self) -> Parcels:
        """What comes, by segment, rank after rank; its row is its first position."""
        attending, size = self.attending, self.plan.setting.segment_size
        wanted = [
            [
                attending.first_task[i] + segment
                for i, reader in enumerate(attending.readers)
                if segment < reader.num_past and rank != self.rank
            ]
            for rank, held in enumerate(self.plan.held)
            for segment in held
        ]
        rows = [segment * size for held in self.plan.held for segment in held]
        return Parcels.of(wanted, rows, self.device)

    @cached_property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Of `leaving` and of `arriving`, int64: which parcels are a rank's, [ranks + 1]."""
        num_here = len(self.plan.held[self.rank])
        leaving = [num_here * rank for rank in range(self.plan.num_ranks + 1)]
        return self._indices(leaving), self._indices([*accumulate(map(len, self.plan.held), initial=0)])

    @cached_property
    def own_rows(self) -> list[tuple[slice, slice]]:
        """Its own keys that queries here see: positions, and rows here; neighbouring segments together."""
        found, row = list[tuple[slice, slice]](), 0
        for held in self.plan.layout.segments[self.rank]:
            stop = min(held.stop, self.num_laid_out)
            if held.start >= stop:
                break
            start, first = held.start, row
            if found and found[-1][0].stop == start:
                start, first = found[-1][0].start, found.pop()[1].start
            row += held.stop - held.start
            found.append((slice(start, stop), slice(first, first + stop - start)))
        return found

    def _indices(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)
