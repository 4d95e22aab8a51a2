"""What became of one request, as its client saw it. Knows no endpoint."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, kw_only=True)
class Record:
    """Times are seconds after the run's start."""

    index: int
    due_s: float
    num_prompt_tokens: int  # sent; the endpoint's own count once it says
    num_asked_tokens: int
    sent_s: float = 0.0
    end_s: float = 0.0
    chunk_times: list[float] = field(default_factory=list)
    chunk_tokens: list[int] = field(default_factory=list)
    num_output_tokens: int = 0  # by usage, or counted
    num_cached_tokens: int = 0
    text: str = ""
    tokens: list[str] = field(default_factory=list)  # their texts, where log-probabilities were asked
    extras: dict[str, Any] = field(default_factory=dict)  # the endpoint's own: timings, csa
    error: str = ""

    @property
    def ok(self) -> bool:
        return not self.error

    @property
    def ttft_s(self) -> float:
        return self.chunk_times[0] - self.sent_s

    @property
    def e2e_s(self) -> float:
        return self.chunk_times[-1] - self.sent_s

    @property
    def tpot_s(self) -> float | None:
        """Mean time of a token after the first; None for an answer of one."""
        num_after = self.num_output_tokens - 1
        return (self.e2e_s - self.ttft_s) / num_after if num_after > 0 else None

    @property
    def token_times(self) -> list[float]:
        """When each token came; those of one chunk came together."""
        pairs = zip(self.chunk_times, self.chunk_tokens, strict=True)
        return [time for time, num_tokens in pairs for _ in range(num_tokens)]

    @property
    def tbt_s(self) -> list[float]:
        """Gaps between tokens as the client saw them: 0 for those that came together."""
        return [late - early for early, late in itertools.pairwise(self.token_times)]
