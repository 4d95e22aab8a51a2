"""Requests as a trace has them -> requests of the engine, as they come. Knows no file format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from megatron_sps2.config import AttentionMode, SamplingParams
from megatron_sps2.engine.request import Request


class Planned(Protocol):
    """What a trace's reader gives; equal hash ids are equal blocks of prompt tokens."""

    @property
    def arrival_s(self) -> float: ...

    @property
    def num_prompt_tokens(self) -> int: ...

    @property
    def num_output_tokens(self) -> int: ...

    @property
    def hash_ids(self) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A request made by hand."""

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    hash_ids: tuple[int, ...] = ()


def make_request(one: Planned, number: int, attention: AttentionMode = "exact") -> Request:
    """Its tokens mean nothing, but are equal where the trace says that they are."""
    return Request(
        request_id=number,
        prompt_ids=_prompt(one, number),
        params=SamplingParams(max_tokens=one.num_output_tokens, ignore_eos=True),
        attention=attention,
        arrived_at=one.arrival_s,
    )


def _prompt(one: Planned, number: int) -> tuple[int, ...]:
    """A block's tokens are its hash id, so that lengths may be scaled; without one, a number of its own."""
    if not one.hash_ids:
        return (-1 - number,) * one.num_prompt_tokens
    count, length = len(one.hash_ids), one.num_prompt_tokens
    bounds = [length * i // count for i in range(count + 1)]
    return tuple(
        hash_id
        for hash_id, start, stop in zip(one.hash_ids, bounds, bounds[1:], strict=False)
        for _ in range(stop - start)
    )
