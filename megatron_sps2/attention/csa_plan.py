"""Who reads what in one prompt's CSA: segments, their ranks, probes and message sizes. Plain integers.

Made once for a prompt; every rank makes the same one, so sizes of messages are known without asking.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property

from megatron_sps2.csa_setting import CsaSetting
from megatron_sps2.ops.sparsity import probe_rows
from megatron_sps2.parallel.layout import Segment, TokenLayout, by_segments, segments_of


@dataclass(frozen=True)
class CsaPlan:
    """Segments are numbered over the whole prompt; a rank holds its own in rising order.

    `setting` becomes the one for a prompt of this length.
    """

    setting: CsaSetting
    num_tokens: int
    num_ranks: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "setting", self.setting.for_prompt(self.num_tokens))

    @cached_property
    def layout(self) -> TokenLayout:
        return by_segments(self.num_tokens, self.num_ranks, self.setting.segment_size)

    @cached_property
    def segments(self) -> list[Segment]:
        return segments_of(self.num_tokens, self.setting.segment_size)

    @cached_property
    def held(self) -> list[list[int]]:
        """Segments of each rank."""
        size = self.setting.segment_size
        return [[segment.start // size for segment in mine] for mine in self.layout.segments]

    @cached_property
    def owner(self) -> list[int]:
        """The rank of each segment."""
        found = {segment: rank for rank, mine in enumerate(self.held) for segment in mine}
        return [found[segment] for segment in range(len(self.segments))]

    @property
    def first_tail(self) -> int:
        """The position from which on queries attend to everything."""
        return max(0, self.num_tokens - self.setting.tail)

    def num_rows(self, segment: int) -> int:
        """Its queries before the tail."""
        mine = self.segments[segment]
        return max(0, min(mine.stop, self.first_tail) - mine.start)

    @cached_property
    def readers(self) -> list[int]:
        """Segments that read a past."""
        return [segment for segment in range(1, len(self.segments)) if self.num_rows(segment)]

    def readers_of(self, rank: int) -> list[int]:
        return [segment for segment in self.readers if self.owner[segment] == rank]

    def num_past(self, rank: int, reader: int) -> int:
        """How many of the rank's segments lie before the reader: they are its first ones, and whole."""
        return bisect_left(self.held[rank], reader)

    def concerns(self, rank: int, reader: int) -> bool:
        """Whether the rank scores keys for the reader: it has some of its past, or is it."""
        return self.owner[reader] == rank or self.num_past(rank, reader) > 0

    def probes(self, segment: int) -> list[int]:
        """Rows of the segment that probe."""
        return probe_rows(self.num_rows(segment), self.setting.num_probes)

    def tail_layout(self) -> TokenLayout:
        """The last queries, with positions counted from the first of them."""
        first = self.first_tail
        return TokenLayout(
            tuple(
                tuple(
                    Segment(max(held.start, first) - first, held.stop - first)
                    for held in mine
                    if held.stop > first
                )
                for mine in self.layout.segments
            )
        )

    def message_bytes(
        self, rank: int, *, num_heads: int, num_kv_heads: int, head_dim: int, element_size: int
    ) -> dict[str, int]:
        """What the rank sends in a layer beside kept keys and values, by collective; heads are one tp rank's.

        A kept key sent costs 2 d e more (key and value): how many there are is known once they are chosen.
        """
        others = [other for other in range(self.num_ranks) if other != rank]
        row, partial = head_dim * element_size, head_dim * element_size + 4
        tail, size = self.tail_layout().tokens_per_rank, self.setting.segment_size
        probes = sums = index = 0
        for reader in self.readers:
            num_probes = len(self.probes(reader)) * num_heads
            past, owner = self.num_past(rank, reader), self.owner[reader]
            if owner == rank:
                probes += num_probes * row * sum(self.num_past(other, reader) > 0 for other in others)
            elif past:
                index += num_kv_heads * past * size // 8
            if self.concerns(rank, reader):
                sums += num_probes * 8 * sum(self.concerns(other, reader) for other in others)
        return {
            "csa_probes": probes,
            "csa_sums": sums,
            "csa_index": index,
            "gather_queries": tail[rank] * num_heads * row * len(others),
            "return_partials": sum(tail[other] for other in others) * num_heads * partial,
        }
