"""Tokens per second of the time in which there was something to do.

In an open loop below saturation every server takes in as many tokens per second as arrive. What tells servers
apart is how long prompts wait for their first token, and answers for their last. Knows records only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_sps2.bench.record import Record

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Busy:
    """Tokens, and seconds in which a prompt waited for its first token, or an answer for its last."""

    prefill_tokens: int = 0
    prefill_s: float = 0.0
    decode_tokens: int = 0  # after the first of each answer
    decode_s: float = 0.0

    def __add__(self, other: Busy) -> Busy:
        return Busy(
            self.prefill_tokens + other.prefill_tokens,
            self.prefill_s + other.prefill_s,
            self.decode_tokens + other.decode_tokens,
            self.decode_s + other.decode_s,
        )

    @property
    def prefill_throughput(self) -> float:
        return self.prefill_tokens / self.prefill_s if self.prefill_s else 0.0

    @property
    def decode_throughput(self) -> float:
        return self.decode_tokens / self.decode_s if self.decode_s else 0.0


def busy(records: Sequence[Record]) -> Busy:
    """Of the records of one run that were answered."""
    answered = [each for each in records if each.ok and each.chunk_times]
    return Busy(
        prefill_tokens=sum(each.num_prompt_tokens for each in answered),
        prefill_s=covered((each.sent_s, each.chunk_times[0]) for each in answered),
        decode_tokens=sum(max(0, each.num_output_tokens - 1) for each in answered),
        decode_s=covered((each.chunk_times[0], each.chunk_times[-1]) for each in answered),
    )


def covered(intervals: Iterable[Interval]) -> float:
    """Length of the union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
