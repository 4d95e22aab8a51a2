"""How far two settings give the same answers to the same prompts. Knows tokens, not where they came from.

Greedy answers go apart for good at their first difference: what follows it says nothing of accuracy, so what
counts is how far they go together.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

Tokens = Sequence[Hashable]


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Shares over the requests that both answered; None where there is none."""

    num_requests: int
    first_token: float | None  # requests whose first tokens are equal
    tokens_until_difference: float | None  # tokens before the first difference, of all
    whole: float | None  # requests whose answers are equal throughout

    def to_json(self) -> dict[str, float | int | None]:
        return asdict(self)


def agreement(found: Mapping[Hashable, Tokens], reference: Mapping[Hashable, Tokens]) -> Agreement:
    """Answers by request, of a setting and of the one that it is held against."""
    pairs = [(found[key], reference[key]) for key in found if key in reference]
    pairs = [(mine, theirs) for mine, theirs in pairs if mine and theirs]
    if not pairs:
        return Agreement(num_requests=0, first_token=None, tokens_until_difference=None, whole=None)
    common = [num_common(mine, theirs) for mine, theirs in pairs]
    lengths = [max(len(mine), len(theirs)) for mine, theirs in pairs]
    return Agreement(
        num_requests=len(pairs),
        first_token=fmean(count > 0 for count in common),
        tokens_until_difference=sum(common) / sum(lengths),
        whole=fmean(count == length for count, length in zip(common, lengths, strict=True)),
    )


def num_common(mine: Tokens, theirs: Tokens) -> int:
    """Tokens before the first difference."""
    for position, (one, other) in enumerate(zip(mine, theirs, strict=False)):
        if one != other:
            return position
    return min(len(mine), len(theirs))
