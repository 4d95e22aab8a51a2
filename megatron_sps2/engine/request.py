"""One request as rank 0 sees it: its prompt, its answer so far, its times.

Knows no blocks and no ranks.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from megatron_sps2.config import ATTENTION_MODES, AttentionMode, ModelConfig, SamplingParams
from megatron_sps2.engine.sampled_token import SampledToken
from megatron_sps2.engine.tokenizer import check_ids

if TYPE_CHECKING:  # rank 0's view needs no torch
    from megatron_sps2.attention.csa_tally import CsaReport


class FinishReason(StrEnum):
    """Why an answer ended; OpenAI's words, and `error` for logits that cannot be sampled."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(slots=True, kw_only=True)
class Request:
    """`prompt_ids` follow `num_past` tokens that the same request has in the cache from an earlier turn."""

    request_id: int
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    num_past: int = 0
    attention: AttentionMode = "exact"
    # Once its prompt is prefilled with CSA; None where it ran exactly.
    csa: CsaReport | None = None
    output: list[SampledToken] = field(default_factory=list)
    # One entry a prompt token where they were asked for; the first token has none.
    prompt_logprobs: list[SampledToken | None] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: str | None = None  # why finish_reason is ERROR
    arrived_at: float = field(default_factory=time.perf_counter)
    started_at: float | None = None  # its first layer
    token_times: list[float] = field(default_factory=list)
    home: int | None = None  # the sp rank where it lives wholly; None: on all of them
    num_cached: int = 0  # prompt tokens found in the prefix cache
    num_preemptions: int = 0
    num_pauses: int = 0  # times its prefill stopped between two layers for something else

    @property
    def num_prompt_tokens(self) -> int:
        """Past and new."""
        return self.num_past + len(self.prompt_ids)

    @property
    def num_tokens(self) -> int:
        return self.num_prompt_tokens + len(self.output)

    @property
    def num_new_tokens(self) -> int:
        """Prompt and answer so far, without what an earlier turn left in the cache."""
        return len(self.prompt_ids) + len(self.output)

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Of the new tokens: prompt and answer so far."""
        return (*self.prompt_ids, *self.output_ids)

    @property
    def output_ids(self) -> list[int]:
        return [token.token_id for token in self.output]

    def take(
        self, token: SampledToken | None, eos_token_ids: Sequence[int], now: float | None = None
    ) -> None:
        """The next token, or None where its logits were poisoned; sets finish_reason if it is the last.

        `now` is given where time.perf_counter() is not the clock.
        """
        if token is None:
            self.finish_reason = FinishReason.ERROR
            self.error = (
                f"no token can be sampled after {len(self.output)} tokens: the logits are not numbers, "
                "or the sampling parameters forbid every token; check the checkpoint and --dtype"
            )
            return
        self.output.append(token)
        self.token_times.append(time.perf_counter() if now is None else now)
        ends = () if self.params.ignore_eos else tuple(eos_token_ids)
        if len(self.output) > self.params.min_tokens and token.token_id in (
            *ends,
            *self.params.stop_token_ids,
        ):
            self.finish_reason = FinishReason.STOP
        elif len(self.output) == self.params.max_tokens:
            self.finish_reason = FinishReason.LENGTH


def check_request(request: Request, model: ModelConfig, max_model_len: int) -> None:
    """Raises ValueError for what cannot be served: no prompt, unknown ids, no possible token, too long."""
    if request.attention not in ATTENTION_MODES:
        raise ValueError(
            f"attention={request.attention!r} is not known; use one of {', '.join(ATTENTION_MODES)}"
        )
    if not request.prompt_ids:
        raise ValueError("the prompt is empty (0 tokens); give at least one token")
    check_ids(request.prompt_ids, model.vocab_size)
    check_ids(request.params.stop_token_ids, model.vocab_size)
    _check_min_tokens(request.params, model)
    longest = min(model.max_seq_len, max_model_len)
    wanted = request.num_prompt_tokens + request.params.max_tokens
    if wanted > longest:
        limit = "max_seq_len of the model" if longest == model.max_seq_len else "--max-model-len"
        raise ValueError(
            f"prompt of {request.num_prompt_tokens} tokens + max_tokens={request.params.max_tokens} = "
            f"{wanted} exceeds {longest} ({limit}); shorten the prompt or lower --max-tokens"
        )


def _check_min_tokens(params: SamplingParams, model: ModelConfig) -> None:
    forbidden = {i for i in (*model.eos_token_ids, *params.stop_token_ids) if 0 <= i < model.vocab_size}
    if params.min_tokens and len(forbidden) == model.vocab_size:
        raise ValueError(
            f"min_tokens={params.min_tokens} forbids eos and stop_token_ids, together all "
            f"{model.vocab_size} tokens of the vocabulary; use min_tokens=0 or fewer stop_token_ids"
        )
