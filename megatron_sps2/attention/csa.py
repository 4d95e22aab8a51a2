"""CSA: every segment attends to itself and to the keys it keeps of earlier segments (method.md section 4).

Probes of a segment score keys where they lie; only kept keys travel, once to each rank that reads them.
A head chunk is selected and fetched between the parts of the attention of the one before. Knows no models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import zip_longest

import torch
from torch import Tensor

from megatron_sps2.attention.csa_plan import CsaPlan
from megatron_sps2.attention.csa_tally import CsaTally
from megatron_sps2.attention.prefill import PrefillShape, kv_chunks, pass_q
from megatron_sps2.attention.spans import Spans
from megatron_sps2.ops import sparsity
from megatron_sps2.ops.attend import attend
from megatron_sps2.ops.merge import merge
from megatron_sps2.parallel.collectives import Handle, Wire, exchange_lists


@dataclass(frozen=True, slots=True, kw_only=True)
class CsaRun:
    """One prompt's CSA on one rank; layers come one after the other."""

    plan: CsaPlan
    wire: Wire
    scale: float
    # True: a head chunk at a time, the next one under way meanwhile. False: all heads at once, same result.
    overlap: bool
    tally: CsaTally
    # Of this tp rank, in the whole model: budgets and strides belong to heads of the model.
    first_kv_head: int = 0
    spans: Spans = field(default_factory=Spans)
    # Told (layer, KV heads, reader, kept [n_kv, m, G]) of every selection here, for measuring.
    observe: Callable[[int, range, int, Tensor], None] | None = None

    @property
    def rank(self) -> int:
        return self.wire.axis.rank


def csa(q: Tensor, k: Tensor, v: Tensor, run: CsaRun, layer: int) -> Tensor:
    """q [s/P, 1, n, d], k and v [s/P, 1, n_kv, d] on whole segments -> [s/P, 1, n, d]."""
    assert q.shape[1] == 1, "CSA takes one prompt at a time"
    sent = run.wire.ledger.total_sent
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    chunks = [_Chunk(run, layer, heads, q, k, v) for heads in kv_chunks(k.shape[2], run.overlap)]
    _finish(chunks[0].fetch())
    for chunk, following in zip_longest(chunks, chunks[1:]):
        ahead = following.fetch() if following else iter(())
        next(ahead, None)
        for _ in chunk.attend(out):
            next(ahead, None)
        _finish(ahead)
    if run.plan.setting.tail:
        with run.spans("tail"):
            _attend_tail(q, k, v, out, run)
    run.tally.bytes_sent += run.wire.ledger.total_sent - sent
    return out


def _finish(stages: Iterator[None]) -> None:
    for _ in stages:
        pass


def _attend_tail(q: Tensor, k: Tensor, v: Tensor, out: Tensor, run: CsaRun) -> None:
    """The last queries of the prompt go to all keys, as decode does; overwrites their rows of `out`."""
    layout = run.plan.tail_layout()
    before = len(q) - layout.tokens_per_rank[run.rank]
    shape = PrefillShape(
        layout=layout, wire=run.wire, scale=run.scale, overlap=False, past=(k[:before], v[:before])
    )
    out[before:] = pass_q(q[before:], k[before:], v[before:], shape)


class _Chunk:
    """Some KV heads of one layer and the query heads that read them."""

    def __init__(self, run: CsaRun, layer: int, heads: range, q: Tensor, k: Tensor, v: Tensor) -> None:
        self._run, self._plan, self._layer, self._heads = run, run.plan, layer, heads
        self._group = q.shape[2] // k.shape[2]
        self._queries = slice(heads.start * self._group, heads.stop * self._group)
        self._q = q[:, 0, self._queries]  # [s/P, n, d]
        self._k, self._v = (x[:, 0, heads.start : heads.stop].transpose(0, 1).contiguous() for x in (k, v))
        self._ranks = range(run.wire.axis.size)
        self._offsets = self._local_offsets()
        # By reader: which keys of each earlier segment it keeps, [n_kv, segments, G]. On the reader's rank
        # all earlier segments, in `_kept_here` those that lie on this rank.
        self._kept: dict[int, Tensor] = {}
        self._kept_here: dict[int, Tensor] = {}
        self._far: tuple[Tensor, Tensor] = self._k, self._v

    def _local_offsets(self) -> dict[int, int]:
        """Where each segment of this rank begins in its rows."""
        offsets, before = {}, 0
        for segment in self._plan.held[self._run.rank]:
            offsets[segment] = before
            before += len(self._plan.segments[segment])
        return offsets

    # Selection and exchange

    def fetch(self) -> Iterator[None]:
        """Selects keys and brings those of other ranks; pauses wherever a message is under way."""
        spans, plan, me = self._run.spans, self._plan, self._run.rank
        sums, scored = dict[int, Tensor](), dict[tuple[int, int], sparsity.Scored]()
        if plan.setting.num_probes:
            with spans("selection"):
                probes = self._send_probes()
            yield
            arrived = self._wait(probes)
            with spans("selection"):
                logs = self._send_sums(self._score(arrived, scored))
            yield
            arrived_sums = self._wait(logs)
            with spans("selection"):
                sums = self._total_sums(arrived_sums)
        with spans("selection"):
            for reader in plan.readers:
                if plan.num_past(me, reader):
                    self._kept_here[reader] = self._select(reader, scored, sums)
                    if self._run.observe:
                        self._run.observe(self._layer, self._heads, reader, self._kept_here[reader])
            scored.clear()
            bits = self._send_bits()
        yield
        masks = self._wait(bits)
        with spans("selection"):
            self._assemble(masks)
            places = self._places_of_arrivals()
            k_handle, v_handle = self._send_kept(places)
        yield
        keys = self._wait(k_handle)
        values = self._wait(v_handle)
        with spans("selection"):
            self._far = self._lay_out(self._k, keys, places), self._lay_out(self._v, values, places)

    def _wait(self, handle: Handle[list[list[Tensor]]]) -> list[list[Tensor]]:
        with self._run.spans("exchange"):
            return handle.wait()

    def _send_probes(self) -> Handle[list[list[Tensor]]]:
        """Of this rank's readers to every rank with some of their past: [probes, n, d] each."""
        plan, me = self._plan, self._run.rank
        rows = {
            reader: self._q[[self._offsets[reader] + row for row in plan.probes(reader)]]
            for reader in plan.readers_of(me)
        }
        outgoing = [
            [rows[reader] for reader in rows if rank == me or plan.num_past(rank, reader)]
            for rank in self._ranks
        ]
        shapes = [
            [
                (len(plan.probes(reader)), *self._q.shape[1:])
                for reader in plan.readers_of(rank)
                if plan.num_past(me, reader)
            ]
            for rank in self._ranks
        ]
        return exchange_lists(self._run.wire, "csa_probes", outgoing, shapes, self._q)

    def _score(
        self, arrived: list[list[Tensor]], scored: dict[tuple[int, int], sparsity.Scored]
    ) -> dict[int, Tensor]:
        """By reader: this rank's part of its probes' sums, [n_kv, probes] float64; own keys apart."""
        plan, me, size = self._plan, self._run.rank, self._plan.setting.segment_size
        sums = {}
        for rank, tensors in enumerate(arrived):
            readers = [reader for reader in plan.readers_of(rank) if rank == me or plan.num_past(me, reader)]
            for reader, probes in zip(readers, tensors, strict=True):
                num_keys = plan.num_past(me, reader) * size
                grouped = probes.unflatten(1, (-1, self._group)).transpose(0, 1)  # [n_kv, probes, g, d]
                for head, own in enumerate(grouped):
                    scored[reader, head] = sparsity.score(
                        own.flatten(0, 1), self._k[head, :num_keys], size, self._run.scale
                    )
                parts = [scored[reader, head].log_sum() for head in range(len(grouped))]
                sums[reader] = torch.stack(parts)
                if rank == me:
                    sums[reader] = torch.stack([sums[reader], self._own_sums(reader, grouped)])
        return sums

    def _own_sums(self, reader: int, grouped: Tensor) -> Tensor:
        """[n_kv, probes] of the reader's own segment."""
        rows, start = self._plan.probes(reader), self._offsets[reader]
        stop = start + self._plan.num_rows(reader)
        return torch.stack(
            [
                sparsity.own_log_sum(own, rows, self._k[head, start:stop], self._run.scale)
                for head, own in enumerate(grouped)
            ]
        )

    def _send_sums(self, sums: dict[int, Tensor]) -> Handle[list[list[Tensor]]]:
        """Every rank that scores for a reader gets the others' parts."""
        plan, me = self._plan, self._run.rank
        self._own_log = {reader: sums[reader][1] for reader in plan.readers_of(me)}
        parts = {
            reader: sparsity.total_log_sum(part) if plan.owner[reader] == me else part
            for reader, part in sums.items()
        }
        shared = [[reader for reader in parts if plan.concerns(rank, reader)] for rank in self._ranks]
        shared = [sorted(readers) for readers in shared]
        outgoing = [[parts[reader] for reader in readers] for readers in shared]
        shapes = [[tuple(parts[reader].shape) for reader in readers] for readers in shared]
        like = self._q.new_empty(0, dtype=torch.float64)
        return exchange_lists(self._run.wire, "csa_sums", outgoing, shapes, like)

    def _total_sums(self, arrived: list[list[Tensor]]) -> dict[int, Tensor]:
        """By reader: its probes' sums over all keys they see, [n_kv, probes]."""
        plan, me = self._plan, self._run.rank
        parts: dict[int, list[Tensor]] = {}
        for rank, tensors in enumerate(arrived):
            readers = [
                reader for reader in plan.readers if plan.concerns(me, reader) and plan.concerns(rank, reader)
            ]
            for reader, part in zip(readers, tensors, strict=True):
                parts.setdefault(reader, []).append(part)
        totals = {reader: sparsity.total_log_sum(torch.stack(found)) for reader, found in parts.items()}
        for reader, own in self._own_log.items():
            for i, head in enumerate(self._heads):
                share = torch.exp2(own[i] - totals[reader][i]).mean()
                self._run.tally.mass(self._layer, head, float(share), complete=True)
        return totals

    def _select(
        self, reader: int, scored: dict[tuple[int, int], sparsity.Scored], totals: dict[int, Tensor]
    ) -> Tensor:
        """Which of this rank's earlier keys the reader keeps: [n_kv, m, G]."""
        plan, setting, tally = self._plan, self._plan.setting, self._run.tally
        past = plan.held[self._run.rank][: plan.num_past(self._run.rank, reader)]
        size = setting.segment_size
        positions = torch.tensor(past, device=self._q.device)[:, None] * size + torch.arange(
            size, device=self._q.device
        )
        always = sparsity.always_kept(
            positions, plan.segments[reader].start, setting.num_sinks, setting.window
        )
        kept = []
        for i, head in enumerate(self._heads):
            mass = scored[reader, i].mass(totals[reader][i]) if totals else None
            kept.append(self._choose(reader, past, positions, head, mass, always))
            tally.read(self._layer, head, kept=int(kept[-1].sum()), far=kept[-1].numel())
            if mass is not None:
                share = float(mass.masked_fill(~kept[-1], 0.0).sum())
                tally.mass(self._layer, head, share, complete=False)
        return torch.stack(kept)

    def _choose(
        self, reader: int, past: list[int], positions: Tensor, head: int, mass: Tensor | None, always: Tensor
    ) -> Tensor:
        setting, model_head = self._plan.setting, self._run.first_kv_head + head
        levels = [setting.level_of(reader, segment) for segment in past]
        if setting.selector == "none":
            return always
        if setting.selector == "strided":
            return always | sparsity.strided(
                positions, [setting.degrees[level] for level in levels], model_head
            )
        assert mass is not None, "the scored selector has probes"
        mass = mass.masked_fill(always, 0.0)  # what is kept anyway uses up no budget
        if setting.is_adaptive:
            return always | sparsity.above_floor(mass, setting.floor_of(self._layer, model_head), reader)
        shares = [setting.density_of(self._layer, model_head, level) for level in levels]
        return always | sparsity.best(
            mass, [-(-int(share * positions.shape[1] * 1024) // 1024) for share in shares]
        )

    def _send_bits(self) -> Handle[list[list[Tensor]]]:
        """To each reader's rank, what it keeps of the keys here: one bit a key."""
        plan, me, size = self._plan, self._run.rank, self._plan.setting.segment_size
        outgoing = [
            [
                sparsity.pack_bits(self._kept_here[reader])
                for reader in plan.readers_of(rank)
                if rank != me and reader in self._kept_here
            ]
            for rank in self._ranks
        ]
        shapes = [
            [
                (len(self._heads), plan.num_past(rank, reader), size // 8)
                for reader in plan.readers_of(me)
                if rank != me and plan.num_past(rank, reader)
            ]
            for rank in self._ranks
        ]
        like = self._q.new_empty(0, dtype=torch.uint8)
        return exchange_lists(self._run.wire, "csa_index", outgoing, shapes, like)

    def _assemble(self, arrived: list[list[Tensor]]) -> None:
        """Fills `_kept` of this rank's readers from the parts of all ranks."""
        plan, me, size = self._plan, self._run.rank, self._plan.setting.segment_size
        for reader in plan.readers_of(me):
            shape = len(self._heads), reader, size
            self._kept[reader] = torch.empty(shape, dtype=torch.bool, device=self._q.device)
        for rank, tensors in enumerate(arrived):
            readers = [reader for reader in plan.readers_of(me) if plan.num_past(rank, reader)]
            parts = (
                [self._kept_here[reader] for reader in readers]
                if rank == me
                else [sparsity.unpack_bits(bits) for bits in tensors]
            )
            for reader, part in zip(readers, parts, strict=True):
                self._kept[reader][:, plan.held[rank][: part.shape[1]]] = part

    def _union(self, readers: list[int], masks: dict[int, Tensor], held: list[int] | None) -> Tensor:
        """What any of the readers keeps: [n_kv, m, G]; of `held` segments only, if given."""
        size = self._plan.setting.segment_size
        parts = []
        for reader in readers:
            mask = masks[reader]
            parts.append(mask if held is None else mask[:, [s for s in held if s < reader]])
        longest = max((part.shape[1] for part in parts), default=0)
        union = torch.zeros(len(self._heads), longest, size, dtype=torch.bool, device=self._q.device)
        for part in parts:
            union[:, : part.shape[1]] |= part
        return union

    def _places_of_arrivals(self) -> list[list[Tensor]]:
        """By rank and head: the places among that rank's keys of those it will send here, rising."""
        plan, me = self._plan, self._run.rank
        unions = [
            self._union(plan.readers_of(me), self._kept, plan.held[rank] if rank != me else [])
            for rank in self._ranks
        ]
        return [[head.flatten().nonzero().squeeze(1) for head in union] for union in unions]

    def _send_kept(
        self, places: list[list[Tensor]]
    ) -> tuple[Handle[list[list[Tensor]]], Handle[list[list[Tensor]]]]:
        """Each rank gets the keys and values that any of its readers keeps, once."""
        plan, me = self._plan, self._run.rank
        chosen: list[list[Tensor]] = []
        for rank in self._ranks:
            readers = [reader for reader in plan.readers_of(rank) if reader in self._kept_here]
            union = self._union(readers if rank != me else [], self._kept_here, None)
            chosen.append([head.flatten().nonzero().squeeze(1) for head in union])
        self._run.tally.keys_sent += sum(len(head) for heads in chosen for head in heads)
        shapes = [
            [(len(head), self._k.shape[2]) for head in heads] if rank != me else []
            for rank, heads in enumerate(places)
        ]

        def send(name: str, x: Tensor) -> Handle[list[list[Tensor]]]:
            outgoing = [
                [x[i].index_select(0, head) for i, head in enumerate(heads)] if rank != me else []
                for rank, heads in enumerate(chosen)
            ]
            return exchange_lists(self._run.wire, name, outgoing, shapes, x)

        return send("csa_k", self._k), send("csa_v", self._v)

    def _lay_out(self, own: Tensor, arrived: list[list[Tensor]], places: list[list[Tensor]]) -> Tensor:
        """Own and arrived keys (or values) at their positions in the prompt: [n_kv, past, d]."""
        plan, me, size = self._plan, self._run.rank, self._plan.setting.segment_size
        if len(self._ranks) == 1:
            return own
        num_segments = max(plan.readers_of(me), default=0)
        whole = own.new_empty(len(own), num_segments, size, own.shape[2])
        for rank in self._ranks:
            held = [segment for segment in plan.held[rank] if segment < num_segments]
            if rank == me:
                whole[:, held] = own[:, : len(held) * size].unflatten(1, (-1, size))
                continue
            starts = torch.tensor(held, device=own.device) * size
            for i, (at, rows) in enumerate(zip(places[rank], arrived[rank], strict=True)):
                whole[i].flatten(0, 1)[starts[at // size] + at % size] = rows
        return whole.flatten(1, 2)

    # Attention

    def attend(self, out: Tensor) -> Iterator[None]:
        """Fills this chunk's heads of out [s/P, 1, n, d], segment by segment; pauses between them."""
        for segment, start in self._offsets.items():
            rows = slice(start, start + self._plan.num_rows(segment))
            if rows.stop == rows.start:
                continue
            place = out[rows, :, self._queries]
            with self._run.spans("local"):
                own, own_lse = self._attend_own(rows)
            with self._run.spans("far"):
                self._attend_far(segment, rows, own, own_lse, place)
            yield

    def _attend_own(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Causal, inside the segment: out [s, 1, n, d], lse [s, 1, n]."""
        k, v = (x[:, rows].transpose(0, 1).unsqueeze(1) for x in (self._k, self._v))
        return attend(self._q[rows].unsqueeze(1), k, v, scale=self._run.scale, diagonal=0)

    def _attend_far(self, segment: int, rows: slice, own: Tensor, own_lse: Tensor, place: Tensor) -> None:
        """Merges attention to the kept keys into that of the own segment; every one is in the past."""
        if segment not in self._kept:
            place.copy_(own)
            return
        for i, kept in enumerate(self._kept[segment]):
            queries = slice(i * self._group, (i + 1) * self._group)
            at = kept.flatten().nonzero().squeeze(1)
            k, v = (x[i].index_select(0, at)[:, None, None] for x in self._far)
            far, far_lse = attend(self._q[rows, None, queries], k, v, scale=self._run.scale, diagonal=None)
            outs = torch.stack([own[:, :, queries], far])
            place[:, :, queries] = merge(outs, torch.stack([own_lse[:, :, queries], far_lse]))[0]
