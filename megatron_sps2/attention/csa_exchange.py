"""CSA, second half of a selection: what each reader keeps travels to its rank, once for all of its readers.

First which keys, one bit each; then keys with their values, in one uneven exchange. How many travel is
known on the host only once it has waited for the bits: the one wait of a head chunk, and none on one rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_sps2.attention.csa_run import HeadChunk
from megatron_sps2.attention.csa_selection import Selection
from megatron_sps2.ops.pack import Packing
from megatron_sps2.parallel.collectives import Handle, exchange_lists, route_rows


class KeptKeys:
    """What this rank's readers keep of all earlier segments, for one head chunk."""

    # uint8 [n_kv, tasks of routes.attending, G / 8], once fetched
    bits: Tensor

    def __init__(self, chunk: HeadChunk) -> None:
        self.chunk, self._run, self._routes = chunk, chunk.run, chunk.run.routes
        self._selection = Selection(chunk)
        # By position, [n_kv, s, d]: on one rank as they are, else once fetched. Places that nobody keeps hold
        # anything.
        self.k, self.v = chunk.k, chunk.v

    def fetch(self) -> Iterator[None]:
        """Selects keys and brings those of other ranks; pauses wherever a message is under way."""
        yield from self._selection.choose()
        if len(self._run.ranks) == 1:
            self.bits = self._selection.bits
            return
        spans, chunk = self._run.spans, self.chunk
        with spans("selection"):
            handle = self._send_bits()
        yield
        arrived = chunk.wait(handle)
        with spans("selection"):
            self._assemble(arrived)
            # What a rank will send, this rank finds as that rank does: from the bits that it sent.
            arriving = self._run.kernels.unite(self.bits, self._routes.arriving)
            kept = self._send_kept(arriving)
        yield
        came = chunk.wait(kept)
        with spans("selection"):
            self._lay_out(came, arriving)

    def _send_bits(self) -> Handle[list[list[Tensor]]]:
        """To each reader's rank, what it keeps of the keys here."""
        routes, bits = self._routes, self._selection.bits
        outgoing = [[bits[:, tasks]] for tasks in routes.tasks_of]
        shapes = [[(len(bits), len(tasks), bits.shape[2])] for tasks in routes.arriving_tasks]
        return exchange_lists(self._run.wire, "csa_index", outgoing, shapes, bits)

    def _assemble(self, arrived: list[list[Tensor]]) -> None:
        """`bits`, from the parts of all ranks."""
        chosen = self._selection.bits
        self.bits = chosen.new_empty(len(chosen), self._routes.attending.num_tasks, chosen.shape[2])
        for tasks, (came,) in zip(self._routes.arriving_tasks, arrived, strict=True):
            self.bits.index_copy_(1, tasks, came)

    def _send_kept(self, arriving: Packing) -> Handle[Tensor]:
        """To each rank the keys that any of its readers keeps, and their values."""
        run, routes, chunk = self._run, self._routes, self.chunk
        leaving = run.kernels.unite(self._selection.bits, routes.leaving)
        sent, received = self._count(leaving, arriving)
        run.tally.keys_sent += sum(sent)
        packed = run.kernels.pack(chunk.k, chunk.v, leaving, routes.leaving, sum(sent))
        return route_rows(packed, run.wire, sent, received, "csa_kept")

    def _count(self, leaving: Packing, arriving: Packing) -> tuple[list[int], list[int]]:
        """Keys to and from each rank."""
        n_kv, num_ranks = len(self.chunk.k), len(self._run.ranks)
        firsts = [
            packing.first.index_select(0, bounds * n_kv)
            for packing, bounds in zip((leaving, arriving), self._routes.bounds, strict=True)
        ]
        counts = torch.stack(firsts).diff().flatten().tolist()  # the host waits here
        return counts[:num_ranks], counts[num_ranks:]

    def _lay_out(self, came: Tensor, arriving: Packing) -> None:
        """Fills `k` and `v`: own keys and those that came, at their positions in the prompt."""
        chunk, routes = self.chunk, self._routes
        size = len(chunk.k), routes.num_laid_out, chunk.k.shape[2]
        self.k, self.v = chunk.k.new_empty(size), chunk.v.new_empty(size)
        for whole, own in ((self.k, chunk.k), (self.v, chunk.v)):
            for positions, rows in routes.own_rows:
                whole[:, positions] = own[:, rows]
        self._run.kernels.lay_out(came, arriving, routes.arriving, self.k, self.v)
