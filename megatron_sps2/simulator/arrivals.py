"""Requests as a trace has them -> requests of the engine, as they come. Knows no file format."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sps2.config import AttentionMode, SamplingParams
from megatron_sps2.engine.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request of a trace; equal hash ids are equal blocks of prompt tokens."""

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    hash_ids: tuple[int, ...] = ()
    block_tokens: float = 512.0  # of a hash id; fewer where lengths are scaled down


def make_request(one: Arrival, number: int, attention: AttentionMode = "exact") -> Request:
    """Its tokens mean nothing, but are equal where the trace says that they are."""
    return Request(
        request_id=number,
        prompt_ids=_prompt(one, number),
        params=SamplingParams(max_tokens=one.num_output_tokens, ignore_eos=True),
        attention=attention,
        arrived_at=one.arrival_s,
    )


def _prompt(one: Arrival, number: int) -> tuple[int, ...]:
    """A block's tokens are its hash id, cut where `sps2 bench` cuts it; without one, a number of its own."""
    if not one.hash_ids:
        return (-1 - number,) * one.num_prompt_tokens
    length = one.num_prompt_tokens
    bounds = [min(length, round(i * one.block_tokens)) for i in range(len(one.hash_ids))] + [length]
    return tuple(
        hash_id
        for hash_id, start, stop in zip(one.hash_ids, bounds, bounds[1:], strict=False)
        for _ in range(stop - start)
    )
