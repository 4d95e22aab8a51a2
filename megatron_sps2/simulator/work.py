"""A step's work on its busiest rank, counted from its plan: operations, bytes, messages. No seconds.

The same counts price a step and are fitted to measured ones.
"""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Of one step; counts that a layer has are added up over its layers."""

    steps: float = 0.0
    layers: float = 0.0
    piece_layers: float = 0.0
    row_layers: float = 0.0
    samples: float = 0.0
    matmul_flops: float = 0.0
    weight_bytes: float = 0.0
    attention_flops: float = 0.0
    kv_bytes: float = 0.0
    # Heads of a prompt, which travel while others attend; and all else.
    exchange_intra_bytes: float = 0.0
    exchange_inter_bytes: float = 0.0
    sent_intra_bytes: float = 0.0
    sent_inter_bytes: float = 0.0
    # Rounds of messages that wait for each other: a collective of n ranks has log2(n) of them.
    intra_rounds: float = 0.0
    inter_rounds: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(**{name: getattr(self, name) + getattr(other, name) for name in COUNTS})

    def times(self, factor: float) -> Work:
        return Work(**{name: getattr(self, name) * factor for name in COUNTS})

    @property
    def bytes_sent(self) -> float:
        """By this rank, whatever the link."""
        return (
            self.exchange_intra_bytes
            + self.exchange_inter_bytes
            + self.sent_intra_bytes
            + self.sent_inter_bytes
        )


COUNTS = tuple(each.name for each in fields(Work))
