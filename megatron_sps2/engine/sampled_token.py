"""A token that was chosen, and how likely it was. Plain data: no torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The chosen token; log-probabilities are those of the raw logits, before penalties and temperature."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
