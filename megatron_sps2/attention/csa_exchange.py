"""CSA, second half of a selection: what each reader keeps travels to its rank, once for all of its readers.

First which keys, one bit each; then the keys and the values, in one uneven exchange each. How many travel is
known on the host only once it has waited for the bits: the one wait of a head chunk, and none on one rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sps2.attention.csa_run import HeadChunk
from megatron_sps2.attention.csa_selection import Selection
from megatron_sps2.ops import sparsity
from megatron_sps2.parallel.collectives import Handle, exchange_lists


@dataclass(frozen=True, slots=True)
class Places:
    """Keys that travel: by rank, then by slot (a segment of it), head and offset. Each int64 [keys]."""

    slot: Tensor
    head: Tensor
    offset: Tensor
    counts: list[int]  # by rank


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
            leaving, arriving = self._find_places()
            self._run.tally.keys_sent += sum(leaving.counts)
            k_handle, v_handle = (
                self._send(name, x, leaving, arriving) for name, x in (("csa_k", chunk.k), ("csa_v", chunk.v))
            )
        yield
        keys, values = chunk.wait(k_handle), chunk.wait(v_handle)
        with spans("selection"):
            self.k, self.v = (
                self._lay_out(own, came, arriving) for own, came in ((chunk.k, keys), (chunk.v, values))
            )

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

    def _find_places(self) -> tuple[Places, Places]:
        """Which keys go to each rank, those that any of its readers keeps; and which come from each.

        What a rank will send, this rank finds as that rank does: from the bits that it sent.
        """
        plan, routes, me = self._run.plan, self._routes, self._run.rank
        num_here = len(plan.held[me])
        bounds = [num_here * rank for rank in range(len(self._run.ranks) + 1)], routes.slots
        unions = [
            _union(bits, slots, bound, me)
            for bits, slots, bound in zip(
                (self._selection.bits, self.bits),
                (routes.leaving_slots, routes.arriving_slots),
                bounds,
                strict=True,
            )
        ]
        by_slot = torch.cat([union.sum((1, 2)) for union in unions]).tolist()  # the host waits here
        counts = by_slot[: bounds[0][-1]], by_slot[bounds[0][-1] :]
        leaving, arriving = (_places(*each) for each in zip(unions, counts, bounds, strict=True))
        return leaving, arriving

    def _send(self, name: str, x: Tensor, leaving: Places, arriving: Places) -> Handle[list[list[Tensor]]]:
        """x [n_kv, s/P, d]: rows leave for each rank, [keys, d]."""
        size, num_here = self._run.plan.setting.segment_size, len(self._run.plan.held[self._run.rank])
        row = leaving.head * x.shape[1] + leaving.slot % max(num_here, 1) * size + leaving.offset
        rows = x.flatten(0, 1).index_select(0, row).split(leaving.counts)
        outgoing, shapes = [[part] for part in rows], [[(count, x.shape[2])] for count in arriving.counts]
        return exchange_lists(self._run.wire, name, outgoing, shapes, x)

    def _lay_out(self, own: Tensor, arrived: list[list[Tensor]], places: Places) -> Tensor:
        """Own rows [n_kv, s/P, d] and those that arrived, at their positions in the prompt."""
        routes = self._routes
        whole = own.new_empty(len(own), routes.num_laid_out, own.shape[2])
        for segment in self._run.plan.layout.segments[self._run.rank]:
            stop = min(segment.stop, len(whole[0]))
            if segment.start < stop:
                start = routes.offset(segment.start // self._run.plan.setting.segment_size)
                whole[:, segment.start : stop] = own[:, start : start + stop - segment.start]
        row = places.head * whole.shape[1] + routes.slot_starts[places.slot] + places.offset
        whole.flatten(0, 1).index_copy_(0, row, torch.cat([part for parts in arrived for part in parts]))
        return whole


def _union(bits: Tensor, slots: Tensor, bounds: list[int], me: int) -> Tensor:
    """bits [n_kv, tasks, G / 8] -> bool [slots, n_kv, G]: what any task of a slot keeps; none of my own."""
    masks = sparsity.unpack_bits(bits).transpose(0, 1)
    counts = masks.new_zeros(bounds[-1], *masks.shape[1:], dtype=torch.int16)
    counts.index_add_(0, slots, masks.short())
    counts[bounds[me] : bounds[me + 1]] = 0
    return counts > 0


def _places(union: Tensor, counts: list[int], bounds: list[int]) -> Places:
    """counts by slot; a rank's slots end where the next one's begin."""
    slot, head, offset = torch.nonzero_static(union, size=sum(counts)).unbind(1)
    by_rank = [sum(counts[start:stop]) for start, stop in zip(bounds, bounds[1:], strict=False)]
    return Places(slot, head, offset, by_rank)
