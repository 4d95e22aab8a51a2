"""Where tokens and heads live: plain integers.

Maps tokens to sp ranks (contiguous, zigzag) and heads to sp ranks. Knows no tensors and no groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens start <= position < stop of a prompt."""

    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Slab:
    """A segment and where it begins in a tensor that lists the tokens rank after rank."""

    offset: int
    segment: Segment


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """Which segments of a prompt each sp rank holds, in the order in which the rank holds them."""

    segments: tuple[tuple[Segment, ...], ...]

    @property
    def num_ranks(self) -> int:
        return len(self.segments)

    @property
    def tokens_per_rank(self) -> list[int]:
        return [sum(map(len, held)) for held in self.segments]

    @property
    def num_tokens(self) -> int:
        return sum(self.tokens_per_rank)

    def turned(self, turn: int) -> TokenLayout:
        """What rank r holds here is held by rank r + turn there."""
        first = -turn % self.num_ranks
        return TokenLayout(self.segments[first:] + self.segments[:first])

    def positions(self, rank: int) -> list[int]:
        """Positions of the tokens on `rank`, in its own order."""
        return [
            position for segment in self.segments[rank] for position in range(segment.start, segment.stop)
        ]

    def slabs(self) -> list[Slab]:
        """Every segment in order of position, with its offset in the rank-after-rank tensor."""
        found, offset = [], 0
        for segment in (segment for held in self.segments for segment in held):
            found.append(Slab(offset, segment))
            offset += len(segment)
        return sorted(found, key=lambda slab: slab.segment.start)

    def find(self, position: int) -> tuple[int, int]:
        """(rank, index on that rank) of the token at `position`."""
        for rank, held in enumerate(self.segments):
            before = 0
            for segment in held:
                if segment.start <= position < segment.stop:
                    return rank, before + position - segment.start
                before += len(segment)
        raise IndexError(f"position {position} is not in a layout of {self.num_tokens} tokens")


def cut(total: int, num_parts: int) -> list[Segment]:
    """`total` in `num_parts` neighbouring segments whose lengths differ by at most one, longer ones first."""
    base, longer = divmod(total, num_parts)
    starts = [part * base + min(part, longer) for part in range(num_parts + 1)]
    return [Segment(starts[part], starts[part + 1]) for part in range(num_parts)]


def cut_in_units(total: int, num_parts: int, unit: int) -> list[Segment]:
    """As `cut`, but between multiples of `unit` only: lengths differ by at most one unit."""
    parts = cut(-(-total // unit), num_parts)
    return [Segment(min(part.start * unit, total), min(part.stop * unit, total)) for part in parts]


def contiguous(num_tokens: int, num_ranks: int, unit: int = 1) -> TokenLayout:
    """Rank r holds the r-th of P neighbouring segments, cut between multiples of `unit`."""
    return TokenLayout(tuple((segment,) for segment in cut_in_units(num_tokens, num_ranks, unit)))


def on_one_rank(num_tokens: int, num_ranks: int, home: int) -> TokenLayout:
    """Rank `home` holds everything."""
    whole = Segment(0, num_tokens)
    return TokenLayout(tuple((whole,) if rank == home else () for rank in range(num_ranks)))


def zigzag(num_tokens: int, num_ranks: int, unit: int = 1) -> TokenLayout:
    """Rank r holds segments r and 2P-1-r of 2P: with a causal mask every rank has the same work."""
    parts = cut_in_units(num_tokens, 2 * num_ranks, unit)
    return TokenLayout(tuple((parts[rank], parts[-1 - rank]) for rank in range(num_ranks)))


def segments_of(num_tokens: int, segment_size: int) -> list[Segment]:
    """Neighbouring segments of `segment_size` tokens; the last one may be shorter."""
    starts = range(0, num_tokens, segment_size)
    return [Segment(start, min(start + segment_size, num_tokens)) for start in starts]


def by_segments(num_tokens: int, num_ranks: int, segment_size: int) -> TokenLayout:
    """Whole segments of a fixed size, zigzag where every rank gets an early and a late one, else contiguous.

    Early segments read little of the past and late ones much, so zigzag levels the work of CSA too.
    """
    segments = segments_of(num_tokens, segment_size)
    if len(segments) < 2 * num_ranks:
        parts = cut(len(segments), num_ranks)
        return TokenLayout(tuple(tuple(segments[part.start : part.stop]) for part in parts))
    parts = cut(len(segments), 2 * num_ranks)
    pairs = ((parts[rank], parts[-1 - rank]) for rank in range(num_ranks))
    return TokenLayout(
        tuple(
            tuple(segments[early.start : early.stop] + segments[late.start : late.stop])
            for early, late in pairs
        )
    )


@dataclass(frozen=True, slots=True)
class HeadGroup:
    """Query heads q_start <= h < q_stop, which read one KV head."""

    kv_head: int
    q_start: int
    q_stop: int

    @property
    def num_queries(self) -> int:
        return self.q_stop - self.q_start


def split_heads(num_heads: int, num_kv_heads: int, num_ranks: int) -> list[list[HeadGroup]]:
    """The head groups of each sp rank, uneven where they do not divide.

    With a KV head for every rank the cut runs between KV heads, so that none crosses the wire twice;
    with fewer, query heads are cut evenly and a KV head goes to each rank that reads it.
    Raises ValueError when num_heads < num_ranks: a rank would have nothing to attend with.
    """
    if num_heads < num_ranks:
        raise ValueError(
            f"{num_heads} query heads (per tp rank) cannot be spread over sp_size={num_ranks}; "
            f"use --strategy pass_kv, or sp_size at most {num_heads}"
        )
    per_kv = num_heads // num_kv_heads
    if num_kv_heads >= num_ranks:
        return [
            [HeadGroup(kv, kv * per_kv, (kv + 1) * per_kv) for kv in range(part.start, part.stop)]
            for part in cut(num_kv_heads, num_ranks)
        ]
    return [_groups_of(part, per_kv) for part in cut(num_heads, num_ranks)]


def _groups_of(queries: Segment, per_kv: int) -> list[HeadGroup]:
    first, last = queries.start // per_kv, (queries.stop - 1) // per_kv
    return [
        HeadGroup(kv, max(queries.start, kv * per_kv), min(queries.stop, (kv + 1) * per_kv))
        for kv in range(first, last + 1)
    ]


def head_range(groups: Sequence[HeadGroup]) -> tuple[tuple[int, int], tuple[int, int]]:
    """((q_start, q_stop), (kv_start, kv_stop)) that neighbouring head groups cover; empty ranges for none."""
    if not groups:
        return (0, 0), (0, 0)
    return (groups[0].q_start, groups[-1].q_stop), (groups[0].kv_head, groups[-1].kv_head + 1)
