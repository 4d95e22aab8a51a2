"""What a policy sees of the scheduler, and what it answers. Plain data, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_sps2.config import ScheduleConfig as PolicyConfig
from megatron_sps2.engine.prefill_progress import Prefill
from megatron_sps2.engine.request import Request

__all__ = ["Choice", "Desk", "Policy", "PolicyConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The next step: some prefills up to a layer, and whether all running requests decode.

    `stops[i]` is where the i-th prefill's chunk ends; all go from the same layer to `last_layer`.
    """

    prefills: Sequence[Prefill] = ()
    stops: Sequence[int] = ()
    last_layer: int = 0
    decode: bool = False


@dataclass(slots=True)
class Timing:
    """How long steps take, as far as it is known: smoothed, in seconds."""

    smoothing: float = 0.3
    decode_s: float | None = None
    _prefill_s: float = 0.0
    _token_layers: float = 0.0

    @property
    def token_layer_s(self) -> float | None:
        """Of one prompt token through one layer, on the busiest rank.

        Long prompts count for more: what a step takes beside its tokens would make a short one's look slow.
        """
        return self._prefill_s / self._token_layers if self._token_layers else None

    def observe_decode(self, seconds: float) -> None:
        known = seconds if self.decode_s is None else self.decode_s
        self.decode_s = known + self.smoothing * (seconds - known)

    def observe_prefill(self, seconds: float, num_token_layers: int) -> None:
        self._prefill_s += seconds - self.smoothing * self._prefill_s
        self._token_layers += num_token_layers - self.smoothing * self._token_layers


class Desk(Protocol):
    """The scheduler, as a policy sees it. Sequences are in order of arrival, `prefilling` of start."""

    @property
    def waiting(self) -> Sequence[Request]: ...

    @property
    def prefilling(self) -> Sequence[Prefill]: ...

    @property
    def running(self) -> Sequence[Request]: ...

    @property
    def num_layers(self) -> int: ...

    @property
    def sp_size(self) -> int: ...

    @property
    def block_size(self) -> int: ...

    def start(self, request: Request, home: int | None = None, *, chunked: bool = False) -> Prefill | None:
        """Gives a waiting request its room, on rank `home` or on all; None where there is none now.

        `chunked`: room is given chunk by chunk, here it is only looked for.
        """
        ...

    def best_home(self, request: Request, load: Sequence[int]) -> int | None:
        """The rank that should hold a short request; None where none can.

        It has room and the least to compute: its `load` and what it has not cached of the prompt.
        """
        ...


class Policy(Protocol):
    """Decides the order of things; keeps no request alive and owns no block."""

    chunked: bool  # whether it cuts prompts along the sequence

    def choose(self, desk: Desk, now: float) -> Choice:
        """The next step. `now` is the scheduler's clock, in seconds."""
        ...

    def observe(self, choice: Choice, seconds: float) -> None:
        """The step that `choose` asked for took this long."""
        ...
