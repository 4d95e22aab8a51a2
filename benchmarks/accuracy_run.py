"""Text through a model on one rank: the prompt by a given attention, all that follows it exactly.

Knows token ids; neither texts nor tasks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.accuracy_prefill import Prefill
from megatron_sps2.attention.core import AttentionStep
from megatron_sps2.engine.trial import Trial
from megatron_sps2.model.heap import keep_freed_memory
from megatron_sps2.ops.attend import attend


@dataclass(slots=True)
class AnswerStep:
    """Attention of a prompt's tokens by `prefill`, and of all that follow exactly over every key so far."""

    num_prompt: int
    prefill: Prefill
    _kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [s, 1, n, d], k and v [s, 1, n_kv, d] -> [s, 1, n, d]; the whole prompt comes first."""
        past = 0
        if layer in self._kept:
            past = len(self._kept[layer][0])
            k, v = (torch.cat([old, new]) for old, new in zip(self._kept[layer], (k, v), strict=True))
        self._kept[layer] = k, v
        split = max(0, self.num_prompt - past)
        parts = [self.prefill.attend(layer, q[:split], k[:split], v[:split])] if split else []
        if split < len(q):
            exact = attend(q[split:], k, v, scale=q.shape[3] ** -0.5, diagonal=past + split)
            parts.append(exact[0])
        return torch.cat(parts)


class Decoder(Trial):
    """A trial that can go on after tokens that `step` has seen."""

    @torch.inference_mode()
    def hidden(self, token_ids: list[int], step: AttentionStep, first: int = 0) -> Tensor:
        """[s, 1, h] of tokens at positions first, first + 1, ..."""
        hidden = self._forward.embed(torch.tensor(token_ids)[:, None])
        angles = self._forward.angles(torch.arange(first, first + len(token_ids)))
        self._context.step = step
        for layer in range(self._forward.num_layers):
            hidden = self._forward.layer(layer, hidden, angles)
        self._context.step = None
        return hidden


def continuation_logits(trial: Decoder, ids: list[int], num_prompt: int, prefill: Prefill) -> Tensor:
    """[len(ids) - num_prompt, v]: row i is what stands for ids[num_prompt + i], given all before it."""
    hidden = trial.hidden(ids[:-1], AnswerStep(num_prompt, prefill))
    return trial.logits(hidden[num_prompt - 1 :])


def greedy(trial: Decoder, prompt_ids: list[int], prefill: Prefill, max_tokens: int) -> list[int]:
    """The answer's token ids, up to an end token."""
    step, answer = AnswerStep(len(prompt_ids), prefill), list[int]()
    hidden = trial.hidden(prompt_ids, step)
    while len(answer) < max_tokens:
        token = int(trial.logits(hidden[-1:]).argmax())
        if token in trial.model.eos_token_ids:
            break
        answer.append(token)
        if len(answer) < max_tokens:
            hidden = trial.hidden([token], step, len(prompt_ids) + len(answer) - 1)
    return answer


@contextmanager
def lone_trial(checkpoint: str | Path, dtype: torch.dtype) -> Iterator[Decoder]:
    """The model in a world of one rank, without a launcher or a port."""
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            trial = Decoder.load(checkpoint, dtype)
            assert isinstance(trial, Decoder)
            yield trial
        finally:
            dist.destroy_process_group()
