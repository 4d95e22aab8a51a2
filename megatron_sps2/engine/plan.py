"""What one engine step does, as plain data: made by the scheduler on rank 0, broadcast, run by every rank.

Knows no torch and no group.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sps2.config import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class NewPrompt:
    """What ranks must know of a prompt before its first layer.

    `blocks[r]` are granted on sp rank r. `num_past` tokens of the request are cached already; `token_ids`
    follow them.
    """

    token_ids: tuple[int, ...]
    num_past: int
    strategy: str
    blocks: tuple[tuple[int, ...], ...]
    params: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillPiece:
    """Layers first_layer <= i < last_layer of a prompt's prefill; `prompt` comes with its first piece."""

    request_id: int
    first_layer: int
    last_layer: int
    prompt: NewPrompt | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeToken:
    """One request's newest token: computed on sp rank `home`, its K and V kept on sp rank `kv_rank`."""

    request_id: int
    token_id: int
    position: int
    home: int
    kv_rank: int
    new_block: int | None  # granted on kv_rank where its last block is full


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPlan:
    """At most one of `prefill` and `decode`: a decode batch never shares a step with prompt tokens."""

    prefill: PrefillPiece | None = None
    decode: tuple[DecodeToken, ...] = ()  # sorted by home
    freed: tuple[int, ...] = ()  # requests whose blocks every rank forgets before the step
    stop: bool = False  # the last plan

    def __post_init__(self) -> None:
        assert not (self.prefill and self.decode), "a plan holds a prefill piece or a decode batch, not both"
