"""What CSA settings cost and save on one text: perplexity, kept keys, bytes, time, beside exact attention.

The prompt runs by a setting, its continuation over all keys, as decode does. Knows a model on one rank.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from megatron_sps2.attention.core import AttentionStep
from megatron_sps2.attention.csa_tally import CsaReport
from megatron_sps2.csa_setting import CsaSetting
from megatron_sps2.engine.trial import AnswerStep, ExactStep, Trial
from megatron_sps2.engine.trial_prefill import CsaPrefill, make_prefill

# Each is timed this often, in turns, and the best counts: other work on the machine only ever adds time.
NUM_TIMINGS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One setting on one text. Ratios are to exact attention: 1 is as exact, bytes_ratio to its pass_kv."""

    name: str
    perplexity: float
    perplexity_ratio: float
    kept_mass: float | None  # of the probes' attention; None without probes
    density: float
    bytes_ratio: float
    speed_ratio: float  # of the prompt's prefill on one rank; 2 is twice as fast
    report: CsaReport | None  # None for the paper's variant, which has no budgets to show


@dataclass(frozen=True, slots=True, kw_only=True)
class TradeOff:
    """All settings on one text, in the order given."""

    exact_perplexity: float
    exact_seconds: float
    settings: tuple[Measured, ...]


def compare(
    trial: Trial,
    token_ids: list[int],
    num_tokens: int,
    settings: Sequence[CsaSetting],
    num_ranks: int,
    progress: Callable[[str], None] = lambda name: None,
) -> TradeOff:
    """The first num_tokens ids are the prompt, the others its continuation.

    Bytes are those of num_ranks sp ranks.
    """
    progress("exact")
    perplexity = _perplexity(trial, token_ids, num_tokens, ExactStep())
    found = []
    for setting in settings:
        progress(setting.name)
        found.append(_quality(trial, token_ids, num_tokens, setting, num_ranks, perplexity))
    progress("timing")
    exact, *seconds = _best_seconds(trial, token_ids[:num_tokens], settings)
    return TradeOff(
        exact_perplexity=perplexity,
        exact_seconds=exact,
        settings=tuple(
            replace(one, speed_ratio=exact / own) for one, own in zip(found, seconds, strict=True)
        ),
    )


def _quality(
    trial: Trial,
    token_ids: list[int],
    num_tokens: int,
    setting: CsaSetting,
    num_ranks: int,
    exact_perplexity: float,
) -> Measured:
    """All but its speed."""
    prefill = make_prefill(setting, num_tokens, num_ranks, trial.model)
    perplexity = _perplexity(trial, token_ids, num_tokens, AnswerStep(num_tokens, prefill))
    cost = prefill.cost()
    return Measured(
        name=setting.name,
        perplexity=perplexity,
        perplexity_ratio=perplexity / exact_perplexity,
        kept_mass=cost.kept_mass,
        density=cost.density,
        bytes_ratio=cost.bytes_ratio,
        speed_ratio=math.nan,
        report=prefill.report() if isinstance(prefill, CsaPrefill) else None,
    )


def _perplexity(trial: Trial, token_ids: list[int], num_tokens: int, step: AttentionStep) -> float:
    """Of the tokens from num_tokens on."""
    logits = trial.logits(trial.hidden(token_ids, step)[num_tokens - 1 : -1])
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(token_ids[num_tokens:]))
    return math.exp(float(loss))


def _best_seconds(trial: Trial, prompt: list[int], settings: Sequence[CsaSetting]) -> list[float]:
    """Of the prompt's prefill: exact, then each setting."""
    makers: list[Callable[[], AttentionStep]] = [
        ExactStep,
        *(functools.partial(make_prefill, setting, len(prompt), 1, trial.model) for setting in settings),
    ]
    best = [math.inf] * len(makers)
    for _ in range(NUM_TIMINGS):
        for i, make in enumerate(makers):
            best[i] = min(best[i], _seconds(trial, prompt, make()))
    return best


def _seconds(trial: Trial, token_ids: list[int], step: AttentionStep) -> float:
    start = time.perf_counter()
    trial.hidden(token_ids, step)
    return time.perf_counter() - start
