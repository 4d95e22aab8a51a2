"""CSA, first half: probes travel to the keys, and the keys' ranks choose what each reader keeps.

Two small messages: probes to the ranks that hold some of their past, and the sums that make scores shares of
attention. What is chosen is exchanged by csa_exchange.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_sps2.attention.csa_run import HeadChunk, Observe
from megatron_sps2.ops import sparsity
from megatron_sps2.ops.kept import ProbeSums
from megatron_sps2.parallel.collectives import Handle, exchange_lists


class Selection:
    """Which of this rank's keys each reader keeps, for one head chunk."""

    # uint8 [n_kv, tasks of routes.scoring, G / 8], once chosen
    bits: Tensor

    def __init__(self, chunk: HeadChunk) -> None:
        self._chunk, self._run, self._routes = chunk, chunk.run, chunk.run.routes
        self._selector = self._run.kernels.key_selector(chunk.k, self._routes.scoring, self._run.scale)

    def choose(self) -> Iterator[None]:
        """Fills `bits`; pauses wherever a message is under way."""
        spans, totals = self._run.spans, None
        if self._run.plan.setting.num_probes:
            with spans("selection"):
                handle = self._send_probes()
            yield
            arrived = self._chunk.wait(handle)
            with spans("selection"):
                probes = torch.cat([part for parts in arrived for part in parts])
                sums = self._selector.score(probes)
                handle = self._send_sums(sums.here)
            yield
            arrived = self._chunk.wait(handle)
            with spans("selection"):
                totals = self._add_up(sums, arrived)
        with spans("selection"):
            self._select(totals)

    def _send_probes(self) -> Handle[list[list[Tensor]]]:
        """Of this rank's readers to every rank with some of their past: [probes, n, d] each."""
        routes, chunk = self._routes, self._chunk
        own = chunk.q.index_select(0, routes.own_probes)
        outgoing = [[own[routes.probes_to(rank)]] for rank in self._run.ranks]
        counts = [block.stop - block.start for block in routes.probes_from]
        shapes = [[(count, *chunk.q.shape[1:])] for count in counts]
        return exchange_lists(self._run.wire, "csa_probes", outgoing, shapes, chunk.q)

    def _send_sums(self, sums: Tensor) -> Handle[list[list[Tensor]]]:
        """Every rank that scores for a reader gets the others' sums, [n_kv, probes, g]."""
        outgoing = [[sums.index_select(1, shared)] for shared in self._routes.shared_probes]
        shapes = [[tuple(x.shape) for x in parts] for parts in outgoing]
        return exchange_lists(self._run.wire, "csa_sums", outgoing, shapes, sums)

    def _add_up(self, sums: ProbeSums, arrived: list[list[Tensor]]) -> Tensor:
        """The probes' sums over all keys, [n_kv, probes, g]. Tallies the own segments' shares."""
        parts = sums.here.new_full((len(arrived), *sums.here.shape), -torch.inf)
        for part, shared, (came,) in zip(parts, self._routes.shared_probes, arrived, strict=True):
            part.index_copy_(1, shared, came)
        totals = sparsity.total_log_sum(parts)
        weight = self._routes.scoring.tensors(totals.device).probe_weight
        shares = (torch.exp2(sums.own - totals).mean(2) * weight).sum(1)
        self._run.tally.mass(self._chunk.layer, self._chunk.heads, shares, reads=self._routes.scoring.num_own)
        return totals

    def _select(self, totals: Tensor | None) -> None:
        chunk, tally, reads = self._chunk, self._run.tally, self._routes.scoring
        kept = self._selector.select(totals, self._run.rule(chunk.layer, chunk.heads))
        far = reads.num_tasks * reads.segment_size
        tally.read(chunk.layer, chunk.heads, kept=kept.num_kept, far=far)
        if kept.mass is not None:
            tally.mass(chunk.layer, chunk.heads, kept.mass, reads=0)
        self.bits = kept.bits
        if self._run.observe:
            self._show(self._run.observe)

    def _show(self, observe: Observe) -> None:
        for i, reader in enumerate(self._routes.scoring.readers):
            if reader.num_past:
                masks = sparsity.unpack_bits(self.bits[:, self._routes.scoring.tasks(i)])
                observe(self._chunk.layer, self._chunk.heads, reader.number, masks)
