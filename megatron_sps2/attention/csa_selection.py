"""CSA, first half: probes travel to the keys, and the keys' ranks choose what each reader keeps.

Two small messages: probes to the ranks that hold some of their past, and the sums that make scores shares of
attention. What is chosen is exchanged by csa_exchange.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_sps2.attention.csa_run import HeadChunk
from megatron_sps2.ops import sparsity
from megatron_sps2.parallel.collectives import Handle, exchange_lists


class Selection:
    """Which of this rank's keys each reader keeps, for one head chunk."""

    def __init__(self, chunk: HeadChunk) -> None:
        self._chunk, self._run, self._plan = chunk, chunk.run, chunk.run.plan
        # By reader: [n_kv, m, G], m the earlier segments on this rank.
        self.kept: dict[int, Tensor] = {}
        self._scored: dict[tuple[int, int], sparsity.Scored] = {}
        # By reader on this rank: log2 sums of its probes over its own segment, [n_kv, probes].
        self._own_sums: dict[int, Tensor] = {}

    def choose(self) -> Iterator[None]:
        """Fills `kept`; pauses wherever a message is under way."""
        spans, me, totals = self._run.spans, self._run.rank, dict[int, Tensor]()
        if self._plan.setting.num_probes:
            with spans("selection"):
                probes = self._send_probes()
            yield
            arrived = self._chunk.wait(probes)
            with spans("selection"):
                sums = self._send_sums(self._score(arrived))
            yield
            arrived = self._chunk.wait(sums)
            with spans("selection"):
                totals = self._add_up(arrived)
        with spans("selection"):
            for reader in self._plan.readers:
                if self._plan.num_past(me, reader):
                    self.kept[reader] = self._select(reader, totals)
                    if self._run.observe:
                        self._run.observe(self._chunk.layer, self._chunk.heads, reader, self.kept[reader])
            self._scored.clear()  # the largest thing here

    def _asking(self, rank: int) -> list[int]:
        """Readers of `rank` whose probes come here."""
        me = self._run.rank
        return [r for r in self._plan.readers_of(rank) if rank == me or self._plan.num_past(me, r)]

    def _send_probes(self) -> Handle[list[list[Tensor]]]:
        """Of this rank's readers to every rank with some of their past: [probes, n, d] each."""
        plan, chunk, me = self._plan, self._chunk, self._run.rank
        rows = {
            reader: chunk.q[[chunk.offset(reader) + row for row in plan.probes(reader)]]
            for reader in plan.readers_of(me)
        }
        outgoing = [
            [rows[reader] for reader in rows if rank == me or plan.num_past(rank, reader)]
            for rank in self._run.ranks
        ]
        shapes = [
            [(len(plan.probes(reader)), *chunk.q.shape[1:]) for reader in self._asking(rank)]
            for rank in self._run.ranks
        ]
        return exchange_lists(self._run.wire, "csa_probes", outgoing, shapes, chunk.q)

    def _score(self, arrived: list[list[Tensor]]) -> dict[int, Tensor]:
        """By reader: log2 of the sums of its probes over what they see here, [n_kv, probes] float64."""
        keys, sums = self._chunk.k.float(), {}  # once, not for every reader
        for rank, tensors in enumerate(arrived):
            for reader, probes in zip(self._asking(rank), tensors, strict=True):
                grouped = probes.unflatten(1, (-1, self._chunk.group)).transpose(0, 1)  # [n_kv, probes, g, d]
                sums[reader] = self._score_past(reader, grouped, keys)
                if rank == self._run.rank:
                    self._own_sums[reader] = self._score_own(reader, grouped, keys)
                    both = torch.stack([sums[reader], self._own_sums[reader]])
                    sums[reader] = sparsity.total_log_sum(both)
        return sums

    def _score_past(self, reader: int, probes: Tensor, keys: Tensor) -> Tensor:
        size = self._plan.setting.segment_size
        num_keys = self._plan.num_past(self._run.rank, reader) * size
        for head, own in enumerate(probes):
            rows = own.flatten(0, 1)
            self._scored[reader, head] = sparsity.score(rows, keys[head, :num_keys], size, self._run.scale)
        return torch.stack([self._scored[reader, head].log_sum() for head in range(len(probes))])

    def _score_own(self, reader: int, probes: Tensor, keys: Tensor) -> Tensor:
        rows, start = self._plan.probes(reader), self._chunk.offset(reader)
        own = keys[:, start : start + self._plan.num_rows(reader)]
        return torch.stack(
            [sparsity.own_log_sum(p, rows, k, self._run.scale) for p, k in zip(probes, own, strict=True)]
        )

    def _sharing(self, rank: int) -> list[int]:
        """Readers that `rank` and this rank both score for."""
        plan, me = self._plan, self._run.rank
        return [r for r in plan.readers if plan.concerns(me, r) and plan.concerns(rank, r)]

    def _send_sums(self, sums: dict[int, Tensor]) -> Handle[list[list[Tensor]]]:
        """Every rank that scores for a reader gets the others' sums."""
        outgoing = [[sums[reader] for reader in self._sharing(rank)] for rank in self._run.ranks]
        shapes = [[tuple(x.shape) for x in parts] for parts in outgoing]
        like = self._chunk.q.new_empty(0, dtype=torch.float64)
        return exchange_lists(self._run.wire, "csa_sums", outgoing, shapes, like)

    def _add_up(self, arrived: list[list[Tensor]]) -> dict[int, Tensor]:
        """By reader: its probes' sums over all keys, [n_kv, probes]. Tallies the own segment's share."""
        parts: dict[int, list[Tensor]] = {}
        for rank, tensors in enumerate(arrived):
            for reader, part in zip(self._sharing(rank), tensors, strict=True):
                parts.setdefault(reader, []).append(part)
        totals = {reader: sparsity.total_log_sum(torch.stack(found)) for reader, found in parts.items()}
        for reader, own in self._own_sums.items():
            shares = torch.exp2(own - totals[reader]).mean(1).tolist()
            for head, share in zip(self._chunk.heads, shares, strict=True):
                self._run.tally.mass(self._chunk.layer, head, share, complete=True)
        return totals

    def _select(self, reader: int, totals: dict[int, Tensor]) -> Tensor:
        """Which of this rank's earlier keys the reader keeps: [n_kv, m, G]."""
        plan, setting = self._plan, self._plan.setting
        past = plan.held[self._run.rank][: plan.num_past(self._run.rank, reader)]
        size, device = setting.segment_size, self._chunk.q.device
        positions = torch.tensor(past, device=device)[:, None] * size + torch.arange(size, device=device)
        always = sparsity.always_kept(
            positions, plan.segments[reader].start, setting.num_sinks, setting.window
        )
        kept = []
        for i, head in enumerate(self._chunk.heads):
            mass = self._scored[reader, i].mass(totals[reader][i]) if totals else None
            kept.append(always | self._by_selector(reader, past, positions, head, mass, always))
            self._count(head, kept[-1], mass)
        return torch.stack(kept)

    def _count(self, head: int, kept: Tensor, mass: Tensor | None) -> None:
        layer, tally = self._chunk.layer, self._run.tally
        tally.read(layer, head, kept=int(kept.sum()), far=kept.numel())
        if mass is not None:
            tally.mass(layer, head, float(mass[kept].sum()), complete=False)

    def _by_selector(
        self, reader: int, past: list[int], positions: Tensor, head: int, mass: Tensor | None, always: Tensor
    ) -> Tensor:
        setting, model_head = self._plan.setting, self._run.first_kv_head + head
        levels = [setting.level_of(reader, segment) for segment in past]
        if setting.selector == "none":
            return always
        if setting.selector == "strided":
            return sparsity.strided(positions, [setting.degrees[level] for level in levels], model_head)
        assert mass is not None, "the scored selector has probes"
        mass = mass.masked_fill(always, 0.0)  # what is kept anyway uses up no budget
        if setting.is_adaptive:
            return sparsity.above_floor(mass, setting.floor_of(self._chunk.layer, model_head), reader)
        shares = [setting.density_of(self._chunk.layer, model_head, level) for level in levels]
        return sparsity.best(mass, [math.ceil(share * positions.shape[1]) for share in shares])
