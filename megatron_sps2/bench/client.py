"""Sends requests to an OpenAI endpoint when they are due, and writes down when each token came.

Open loop: a request leaves at its time, however slow the answers are. An error is a record like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_sps2.bench.workload import Ask


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """Where requests go, and what is the same in each."""

    base_url: str  # without /v1
    model: str
    api_key: str = ""
    timeout_s: float = 600.0  # of a request, from sending to its last token
    ask_logprobs: bool = True  # count tokens by them; without, each chunk counts as one
    extra_body: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0, "ignore_eos": True})


@dataclass(slots=True, kw_only=True)
class Record:
    """What became of one request. Times are seconds after the run's start."""

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
    tokens: list[str] = field(default_factory=list)  # texts of the tokens, where log-probabilities were asked
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
        after = self.num_output_tokens - 1
        return (self.e2e_s - self.ttft_s) / after if after > 0 else None

    @property
    def tbt_s(self) -> list[float]:
        """Gaps between tokens as the client saw them: 0 for those that came together."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Served:
    """What an endpoint says of its model."""

    model: str
    max_model_len: int | None


async def ask_served(base_url: str, model: str | None, api_key: str = "") -> Served:
    """The model `model`, or the first one that is served. ValueError for none, OSError for no endpoint."""
    raise NotImplementedError


async def run(
    asks: Sequence[Ask],
    endpoint: Endpoint,
    *,
    max_concurrency: int | None = None,
    on_done: Callable[[Record], None] | None = None,
) -> list[Record]:
    """All of `asks`, each sent at its arrival_s -> their records in order."""
    raise NotImplementedError
