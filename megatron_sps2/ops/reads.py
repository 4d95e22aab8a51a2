"""Which segments of a prompt read which others, as CSA's functions see it: plain integers and their tensors.

A task is one earlier segment that lies here and one reader of it; tasks count reader after reader, and within
one by position. Knows no rank and no setting.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Reader:
    """A segment whose queries read earlier ones."""

    number: int  # which segment of the prompt it is
    # By earlier segment that lies here, those being the first ones: at which level it is (csa_setting).
    levels: tuple[int, ...]
    num_rows: int  # its queries
    probes: tuple[int, ...]  # those rows of it that probe
    # Where its queries and its own keys begin in the tensors of a call; None: they are not in there.
    query_row: int | None
    key_row: int | None

    @property
    def num_past(self) -> int:
        return len(self.levels)


@dataclass(frozen=True, slots=True)
class ReadTensors:
    """`Reads` on a device; int32 unless said otherwise. Own rows are -1 where they are not in there."""

    # By task: its reader (counted here), its segment's first row in k, that row's position, its level.
    task_reader: Tensor
    task_row: Tensor
    task_position: Tensor
    task_level: Tensor  # int64
    task_number: Tensor  # float64: its reader's number
    # By reader, and one more entry for the first two: where its tasks and its probes begin.
    first_task: Tensor
    first_probe: Tensor
    start: Tensor  # its first position
    num_rows: Tensor
    query_row: Tensor
    key_row: Tensor
    # By probe: its row within its segment, its row in q (int64), and one over how many its reader has
    # (float64; 0 where the reader's own keys are not in there).
    probe_row: Tensor
    probe_query: Tensor
    probe_weight: Tensor


@dataclass(frozen=True)
class Reads:
    """The i-th segment that lies here is number held[i] of the prompt, and i * segment_size its first row."""

    segment_size: int
    held: tuple[int, ...]
    readers: tuple[Reader, ...]
    _tensors: dict[torch.device, ReadTensors] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def first_task(self) -> list[int]:
        """By reader, and how many there are in all."""
        return [*accumulate((reader.num_past for reader in self.readers), initial=0)]

    @cached_property
    def first_probe(self) -> list[int]:
        return [*accumulate((len(reader.probes) for reader in self.readers), initial=0)]

    @property
    def num_tasks(self) -> int:
        return self.first_task[-1]

    @property
    def num_probes(self) -> int:
        return self.first_probe[-1]

    @cached_property
    def num_own(self) -> int:
        """Readers with probes whose own keys are in there."""
        return sum(reader.key_row is not None and bool(reader.probes) for reader in self.readers)

    def tasks(self, reader: int) -> slice:
        """Of the reader-th reader."""
        return slice(self.first_task[reader], self.first_task[reader + 1])

    def probes(self, reader: int) -> slice:
        return slice(self.first_probe[reader], self.first_probe[reader + 1])

    def slices(self, max_tasks: int) -> Iterator[range]:
        """Neighbouring readers of at most `max_tasks` together; one reader at least."""
        first = 0
        for reader in range(len(self.readers)):
            if self.first_task[reader + 1] - self.first_task[first] > max_tasks and reader > first:
                yield range(first, reader)
                first = reader
        if self.readers:
            yield range(first, len(self.readers))

    def tensors(self, device: torch.device) -> ReadTensors:
        """Made once: one prompt's layers share them."""
        if device not in self._tensors:
            self._tensors[device] = self._make_tensors(device)
        return self._tensors[device]

    def _make_tensors(self, device: torch.device) -> ReadTensors:
        size, readers = self.segment_size, self.readers
        tasks = [(i, s, level) for i, reader in enumerate(readers) for s, level in enumerate(reader.levels)]
        probes = [(reader, row) for reader in readers for row in reader.probes]

        def ints(values: list[int], dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        def rows(values: list[int | None]) -> Tensor:
            return ints([-1 if value is None else value for value in values])

        weights = [0.0 if reader.key_row is None else 1 / len(reader.probes) for reader, _ in probes]
        return ReadTensors(
            task_reader=ints([i for i, _, _ in tasks]),
            task_row=ints([s * size for _, s, _ in tasks]),
            task_position=ints([self.held[s] * size for _, s, _ in tasks]),
            task_level=ints([level for _, _, level in tasks], torch.int64),
            task_number=ints([readers[i].number for i, _, _ in tasks], torch.float64),
            first_task=ints(self.first_task),
            first_probe=ints(self.first_probe),
            start=ints([reader.number * size for reader in readers]),
            num_rows=ints([reader.num_rows for reader in readers]),
            query_row=rows([reader.query_row for reader in readers]),
            key_row=rows([reader.key_row for reader in readers]),
            probe_row=ints([row for _, row in probes]),
            probe_query=ints([(reader.query_row or 0) + row for reader, row in probes], torch.int64),
            probe_weight=torch.tensor(weights, dtype=torch.float64, device=device),
        )
