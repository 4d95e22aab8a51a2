"""Text through a model on one rank: the prompt by a given attention, all that follows it exactly.

Knows token ids; neither texts nor tasks.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sps2.config import KVCacheDType
from megatron_sps2.engine.trial import AnswerStep, Trial
from megatron_sps2.engine.trial_prefill import Prefill
from megatron_sps2.model.heap import keep_freed_memory


def continuation_logits(
    trial: Trial, ids: list[int], num_prompt: int, prefill: Prefill, kept: KVCacheDType = "auto"
) -> Tensor:
    """[len(ids) - num_prompt, v]: row i is what stands for ids[num_prompt + i], given all before it."""
    hidden = trial.hidden(ids[:-1], AnswerStep(num_prompt, prefill, kept))
    return trial.logits(hidden[num_prompt - 1 :])


def greedy(
    trial: Trial, prompt_ids: list[int], prefill: Prefill, max_tokens: int, kept: KVCacheDType = "auto"
) -> list[int]:
    """The answer's token ids, up to an end token."""
    step, answer = AnswerStep(len(prompt_ids), prefill, kept), list[int]()
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
def lone_trial(checkpoint: str | Path, dtype: torch.dtype) -> Iterator[Trial]:
    """The model in a world of one rank, without a launcher or a port."""
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield Trial.load(checkpoint, dtype)
        finally:
            dist.destroy_process_group()
