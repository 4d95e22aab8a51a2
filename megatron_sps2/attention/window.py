"""Prefill of a windowed layer: keys travel only to the ranks whose tokens see them.

A segment needs the window - 1 tokens before it, its halo, wherever they lie; of a context that is cached only
the first window - 1 queries see anything, and they go to where it lies. So a layer sends as much for a prompt
of a million tokens as for one of some thousands.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_sps2.ops.merge import merge
from megatron_sps2.ops.window import attend_window
from megatron_sps2.parallel.collectives import Wire, gather_tokens, return_partials, route_rows
from megatron_sps2.parallel.layout import Segment, TokenLayout


@dataclass(frozen=True, slots=True)
class Windows:
    """Which layers, from 0, see only the last `size` tokens."""

    size: int
    layers: frozenset[int]


NO_WINDOWS = Windows(0, frozenset())


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring tokens of a prompt: where they lie on `rank`, and which ones they are."""

    rank: int
    row: int
    places: Segment

    def within(self, start: int, stop: int) -> Run:
        """The part of the run between two positions; it may be empty."""
        first, last = max(start, self.places.start), min(stop, self.places.stop)
        return Run(self.rank, self.row + first - self.places.start, Segment(first, max(first, last)))


def runs_of(layout: TokenLayout, rank: int) -> list[Run]:
    """What `rank` holds, in its order."""
    found, row = list[Run](), 0
    for segment in layout.segments[rank]:
        found.append(Run(rank, row, segment))
        row += len(segment)
    return [run for run in found if len(run.places)]


def halo(layout: TokenLayout, rank: int, window: int) -> list[Run]:
    """What tokens of `rank` see and other ranks hold, by holder and its order; no token twice."""
    wanted = _joined([_before(run.places, window) for run in runs_of(layout, rank)])
    others = (run for other in range(layout.num_ranks) if other != rank for run in runs_of(layout, other))
    cuts = (run.within(each.start, each.stop) for run in others for each in wanted)
    return [cut for cut in cuts if len(cut.places)]


def halo_tokens(layout: TokenLayout, window: int) -> int:
    """Tokens whose K and V cross the wire in a layer, over all ranks."""
    ranks = range(layout.num_ranks)
    return sum(len(run.places) for rank in ranks for run in halo(layout, rank, window))


def _before(segment: Segment, window: int) -> Segment:
    return Segment(max(0, segment.start - window + 1), segment.start)


def _joined(segments: list[Segment]) -> list[Segment]:
    """Rising, overlapping ones made one."""
    found = list[Segment]()
    for segment in sorted(segments, key=lambda each: each.start):
        if found and segment.start <= found[-1].stop:
            found[-1] = Segment(found[-1].start, max(found[-1].stop, segment.stop))
        else:
            found.append(segment)
    return found


@dataclass(slots=True, kw_only=True)
class WindowPlan:
    """What a rank sends, receives and reads of one prompt, the same in all windowed layers."""

    layout: TokenLayout
    wire: Wire
    window: int
    scale: float
    start: int  # position of the prompt's first token; what comes before is cached
    spread: bool  # False: the prompt lives on one rank, and nothing travels
    device: torch.device
    past_positions: Tensor  # of the cached tokens in this shard that the prompt may see, rising
    _sent: list[int] = field(init=False)  # rows to each rank
    _sent_rows: Tensor = field(init=False)
    _received: list[int] = field(init=False)
    _reads: list[tuple[Run, Tensor, Tensor]] = field(init=False)
    _asking: list[list[Run]] = field(init=False)  # of each rank, what sees something that is cached

    def __post_init__(self) -> None:
        me, ranks = self.wire.axis.rank, range(self.layout.num_ranks)
        halos = [halo(self.layout, rank, self.window) for rank in ranks]
        mine = [[run for run in wanted if run.rank == me] for wanted in halos]
        self._sent = [_count(runs) for runs in mine]
        self._sent_rows = self._rows([run for runs in mine for run in runs])
        self._received = [_count([run for run in halos[me] if run.rank == rank]) for rank in ranks]
        self._reads = self._plan_reads(halos[me])
        asking, last = ranks if self.spread else [me], self.window - 1 if self.start else 0
        self._asking = [
            [run.within(0, last) for run in runs_of(self.layout, rank)] if rank in asking else []
            for rank in ranks
        ]

    def _plan_reads(self, arriving: list[Run]) -> list[tuple[Run, Tensor, Tensor]]:
        """(own run, rows of the keys it sees, their positions): own keys first, then those that arrive."""
        me = self.wire.axis.rank
        own, row = runs_of(self.layout, me), self.layout.tokens_per_rank[me]
        keys = list(own)
        for run in arriving:
            keys.append(Run(me, row, run.places))
            row += len(run.places)
        keys.sort(key=lambda run: run.places.start)
        found = []
        for run in own:
            seen = [key.within(_before(run.places, self.window).start, run.places.stop) for key in keys]
            found.append((run, self._rows(seen), self._positions(seen)))
        return found

    def attend(self, q: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor]) -> Tensor:
        """q [s/P, 1, n, d], k and v [s/P, 1, n_kv, d]; past: k and v at past_positions -> [s/P, 1, n, d]."""
        out, lse = self._attend_new(q, k, v)
        if any(map(_count, self._asking)):
            rows = self._rows(self._asking[self.wire.axis.rank])
            seen_out, seen_lse = self._attend_past(q[rows], past)
            both = torch.stack([out[rows], seen_out]), torch.stack([lse[rows], seen_lse])
            out[rows] = merge(*both)[0]
        return out

    def _attend_new(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.spread:
            both = torch.stack([k[self._sent_rows], v[self._sent_rows]], dim=1)
            arrived = route_rows(both, self.wire, self._sent, self._received, "exchange_window").wait()
            k, v = (torch.cat(pair) for pair in zip((k, v), arrived.unbind(dim=1), strict=True))
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        for run, rows, positions in self._reads:
            mine = slice(run.row, run.row + len(run.places))
            out[mine], lse[mine] = attend_window(
                *(q[mine], k[rows], v[rows]),
                scale=self.scale,
                q_positions=positions[-len(run.places) :],
                k_positions=positions,
                window=self.window,
            )
        return out, lse

    def _attend_past(self, q: Tensor, past: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The queries that see something cached go to all shards; what they see there comes home."""
        counts = [_count(runs) for runs in self._asking]
        if self.spread:
            q = gather_tokens(q, self.wire, counts, "gather_queries").wait()
        places = self._positions([run for runs in self._asking for run in runs])
        order = torch.argsort(places)
        out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
        out[order], lse[order] = attend_window(
            *(q[order], *past),
            scale=self.scale,
            q_positions=places[order] + self.start,
            k_positions=self.past_positions,
            window=self.window,
        )
        return merge(*return_partials(out, lse, self.wire, counts).wait()) if self.spread else (out, lse)

    def _rows(self, runs: list[Run]) -> Tensor:
        return self._ranges((run.row, run.row + len(run.places)) for run in runs)

    def _positions(self, runs: list[Run]) -> Tensor:
        return self._ranges((run.places.start, run.places.stop) for run in runs)

    def _ranges(self, pairs: Iterable[tuple[int, int]]) -> Tensor:
        parts = [torch.arange(start, stop, device=self.device) for start, stop in pairs]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=self.device)


def _count(runs: list[Run]) -> int:
    return sum(len(run.places) for run in runs)
