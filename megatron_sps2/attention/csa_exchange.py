"""CSA, second half of a selection: what each reader keeps travels to its rank, once for all of its readers.

First which keys, one bit each; then the keys and the values, in one uneven exchange each.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_sps2.attention.csa_run import HeadChunk
from megatron_sps2.attention.csa_selection import Selection
from megatron_sps2.ops import sparsity
from megatron_sps2.parallel.collectives import Handle, exchange_lists

# By rank and KV head: places among that rank's keys, rising.
Places = list[list[Tensor]]


class KeptKeys:
    """What this rank's readers keep of all earlier segments, for one head chunk."""

    def __init__(self, chunk: HeadChunk) -> None:
        self.chunk, self._run, self._plan = chunk, chunk.run, chunk.run.plan
        self._selection = Selection(chunk)
        # By reader on this rank: [n_kv, earlier segments, G].
        self._kept: dict[int, Tensor] = {}
        # Keys and values by position, [n_kv, earlier tokens, d]; places that nobody keeps hold anything.
        self._k, self._v = chunk.k, chunk.v

    def fetch(self) -> Iterator[None]:
        """Selects keys and brings those of other ranks; pauses wherever a message is under way."""
        spans, chunk = self._run.spans, self.chunk
        yield from self._selection.choose()
        with spans("selection"):
            bits = self._send_bits()
        yield
        masks = chunk.wait(bits)
        with spans("selection"):
            self._assemble(masks)
            leaving, arriving = self._leaving(), self._arriving()
            k_handle, v_handle = (
                self._send("csa_k", chunk.k, leaving, arriving),
                self._send("csa_v", chunk.v, leaving, arriving),
            )
        yield
        keys, values = chunk.wait(k_handle), chunk.wait(v_handle)
        with spans("selection"):
            if len(self._run.ranks) > 1:
                self._k, self._v = (
                    self._lay_out(chunk.k, keys, arriving),
                    self._lay_out(chunk.v, values, arriving),
                )

    def of(self, segment: int, head: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values that a segment keeps of the chunk's head-th KV head, [m, d] each, by position."""
        if segment not in self._kept:
            return None
        at = self._kept[segment][head].flatten().nonzero().squeeze(1)
        return self._k[head].index_select(0, at), self._v[head].index_select(0, at)

    def _send_bits(self) -> Handle[list[list[Tensor]]]:
        """To each reader's rank, what it keeps of the keys here."""
        plan, me, kept = self._plan, self._run.rank, self._selection.kept
        num_heads, num_bytes = len(self.chunk.heads), plan.setting.segment_size // 8
        outgoing = [
            [sparsity.pack_bits(kept[reader]) for reader in plan.readers_of(rank) if reader in kept]
            if rank != me
            else []
            for rank in self._run.ranks
        ]
        shapes = [
            [(num_heads, plan.num_past(rank, reader), num_bytes) for reader in self._reading(rank)]
            for rank in self._run.ranks
        ]
        like = self.chunk.q.new_empty(0, dtype=torch.uint8)
        return exchange_lists(self._run.wire, "csa_index", outgoing, shapes, like)

    def _reading(self, rank: int) -> list[int]:
        """Readers on this rank that have some of their past on `rank`."""
        plan = self._plan
        return [r for r in plan.readers_of(self._run.rank) if plan.num_past(rank, r)]

    def _assemble(self, arrived: list[list[Tensor]]) -> None:
        """Fills `_kept` from the parts of all ranks."""
        plan, me, size = self._plan, self._run.rank, self._plan.setting.segment_size
        for reader in plan.readers_of(me):
            shape = len(self.chunk.heads), reader, size
            self._kept[reader] = torch.empty(shape, dtype=torch.bool, device=self.chunk.q.device)
        for rank, tensors in enumerate(arrived):
            readers = self._reading(rank)
            parts = (
                [self._selection.kept[reader] for reader in readers]
                if rank == me
                else [sparsity.unpack_bits(bits) for bits in tensors]
            )
            for reader, part in zip(readers, parts, strict=True):
                self._kept[reader][:, plan.held[rank][: part.shape[1]]] = part

    def _leaving(self) -> Places:
        """Which keys go to each rank: those that any of its readers keeps."""
        kept, me = self._selection.kept, self._run.rank
        places = [
            self._union([kept[r] for r in self._plan.readers_of(rank) if r in kept] if rank != me else [])
            for rank in self._run.ranks
        ]
        self._run.tally.keys_sent += sum(len(head) for heads in places for head in heads)
        return places

    def _arriving(self) -> Places:
        """Which keys each rank will send: the same as it finds itself, from the bits it sent."""
        plan, me = self._plan, self._run.rank
        return [
            self._union(
                [self._kept[r][:, plan.held[rank][: plan.num_past(rank, r)]] for r in self._reading(rank)]
                if rank != me
                else []
            )
            for rank in self._run.ranks
        ]

    def _union(self, masks: list[Tensor]) -> list[Tensor]:
        """Masks [n_kv, m, G] of any m -> by head the places that any of them keeps."""
        if not masks:
            return [torch.empty(0, dtype=torch.int64, device=self.chunk.q.device) for _ in self.chunk.heads]
        union = torch.zeros_like(max(masks, key=lambda mask: mask.shape[1]))
        for mask in masks:
            union[:, : mask.shape[1]] |= mask
        return [head.flatten().nonzero().squeeze(1) for head in union]

    def _send(self, name: str, x: Tensor, leaving: Places, arriving: Places) -> Handle[list[list[Tensor]]]:
        """x [n_kv, s/P, d]: rows leave for each rank, [m, d] a head."""
        outgoing = [[own.index_select(0, at) for own, at in zip(x, heads, strict=True)] for heads in leaving]
        shapes = [[(len(at), x.shape[2]) for at in heads] for heads in arriving]
        return exchange_lists(self._run.wire, name, outgoing, shapes, x)

    def _lay_out(self, own: Tensor, arrived: list[list[Tensor]], places: Places) -> Tensor:
        """Own rows [n_kv, s/P, d] and those that arrived, at their positions in the prompt."""
        plan, me, size = self._plan, self._run.rank, self._plan.setting.segment_size
        num_segments = max(plan.readers_of(me), default=0)
        whole = own.new_empty(len(own), num_segments, size, own.shape[2])
        for rank in self._run.ranks:
            held = plan.held[rank][: plan.num_past(rank, num_segments)]
            if rank == me:
                whole[:, held] = own[:, : len(held) * size].unflatten(1, (-1, size))
                continue
            starts = torch.tensor(held, dtype=torch.int64, device=own.device) * size
            for i, (at, rows) in enumerate(zip(places[rank], arrived[rank], strict=True)):
                whole[i].flatten(0, 1)[starts[at // size] + at % size] = rows
        return whole.flatten(1, 2)
