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
from torch import Tensor

from megatron_sps2.attention.core import AttentionStep
from megatron_sps2.attention.csa import CsaRun, csa
from megatron_sps2.attention.csa_plan import CsaPlan
from megatron_sps2.attention.csa_tally import CsaReport, CsaTally, add_up
from megatron_sps2.config import ModelConfig
from megatron_sps2.csa_setting import CsaSetting
from megatron_sps2.engine.csa_bytes import VirtualRanks
from megatron_sps2.engine.trial import ExactStep, Trial
from megatron_sps2.ops.attend import attend
from megatron_sps2.parallel.collectives import Wire
from megatron_sps2.parallel.groups import world_axis
from megatron_sps2.parallel.ledger import Ledger

ELEMENT_SIZE = 4  # a trial runs in fp32
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
    report: CsaReport


@dataclass(frozen=True, slots=True, kw_only=True)
class TradeOff:
    """All settings on one text, in the order given."""

    exact_perplexity: float
    exact_seconds: float
    settings: tuple[Measured, ...]


class CsaThenExact:
    """CSA among the prompt's tokens; whatever follows them attends to everything."""

    def __init__(self, run: CsaRun) -> None:
        self._run = run

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [s, 1, n, d], k and v [s, 1, n_kv, d] -> [s, 1, n, d]; the first tokens are the prompt."""
        prompt = self._run.plan.num_tokens
        out = csa(q[:prompt], k[:prompt], v[:prompt], self._run, layer)
        rest = attend(q[prompt:], k, v, scale=self._run.scale, diagonal=prompt)[0]
        return torch.cat([out, rest])


def csa_run(
    setting: CsaSetting,
    num_tokens: int,
    model: ModelConfig,
    observe: Callable[[int, range, int, Tensor], None] | None = None,
) -> CsaRun:
    """For one prompt in a world of one rank."""
    return CsaRun(
        plan=CsaPlan(setting, num_tokens, 1),
        wire=Wire(world_axis(), Ledger()),
        scale=model.head_dim**-0.5,
        overlap=False,
        tally=CsaTally(model.num_layers, model.num_query_groups),
        observe=observe,
    )


def compare(
    trial: Trial,
    token_ids: list[int],
    num_tokens: int,
    settings: Sequence[CsaSetting],
    num_ranks: int,
    progress: Callable[[str], None] = lambda name: None,
) -> TradeOff:
    """The first num_tokens ids are the prompt, the others its continuation.

    Bytes are those of num_ranks sp ranks. Raises ValueError for a setting without segments of its own.
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
    model = trial.model
    ranks = VirtualRanks(
        setting=setting,
        num_tokens=num_tokens,
        num_ranks=num_ranks,
        model=model,
        element_size=ELEMENT_SIZE,
    )
    run = csa_run(setting, num_tokens, model, ranks.observe)
    perplexity = _perplexity(trial, token_ids, num_tokens, CsaThenExact(run))
    report = _report(run, model)
    return Measured(
        name=setting.name,
        perplexity=perplexity,
        perplexity_ratio=perplexity / exact_perplexity,
        kept_mass=report.kept_mass,
        density=report.density,
        bytes_ratio=ranks.ratio_to_pass_kv(),
        speed_ratio=math.nan,
        report=report,
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
        *(functools.partial(_new_step, setting, len(prompt), trial.model) for setting in settings),
    ]
    best = [math.inf] * len(makers)
    for _ in range(NUM_TIMINGS):
        for i, make in enumerate(makers):
            best[i] = min(best[i], _seconds(trial, prompt, make()))
    return best


def _new_step(setting: CsaSetting, num_tokens: int, model: ModelConfig) -> CsaThenExact:
    return CsaThenExact(csa_run(setting, num_tokens, model))


def _seconds(trial: Trial, token_ids: list[int], step: AttentionStep) -> float:
    start = time.perf_counter()
    trial.hidden(token_ids, step)
    return time.perf_counter() - start


def _report(run: CsaRun, model: ModelConfig) -> CsaReport:
    """Its bytes are this rank's: none."""
    return add_up(
        run.tally.encode()[None],
        tp_size=1,
        num_layers=model.num_layers,
        setting=run.plan.setting.name,
        bytes_exact=0,
        bytes_formula=lambda keys_sent: 0,
    )
