"""A model on this rank alone, run over a text with any attention: for measuring what an attention costs.

No cache, no scheduler, no sampling: hidden states and logits. Knows a world of one rank.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from megatron_sps2.attention.core import AttentionStep, SequenceParallelAttention, StepContext
from megatron_sps2.config import KVCacheDType, ModelConfig, ParallelConfig
from megatron_sps2.model.checkpoint import load_gpt
from megatron_sps2.model.gpt import GptForward
from megatron_sps2.ops.attend import attend
from megatron_sps2.ops.quantized import dequantize, quantize
from megatron_sps2.parallel.groups import ParallelGroups


class ExactStep:
    """Causal attention to everything: what every other attention is held against."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [s, 1, n, d], k and v [s, 1, n_kv, d] -> [s, 1, n, d]"""
        return attend(q, k, v, scale=q.shape[3] ** -0.5, diagonal=0)[0]


@dataclass(slots=True)
class AnswerStep:
    """Attention of a prompt's tokens by `prefill`, and of all that follow exactly over every key so far."""

    num_prompt: int
    prefill: AttentionStep
    kv_cache_dtype: KVCacheDType = (
        "auto"  # fp8: keys and values are rounded first, as the engine's cache does
    )
    _kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [s, 1, n, d], k and v [s, 1, n_kv, d] -> [s, 1, n, d]; the whole prompt comes first."""
        past = 0
        if self.kv_cache_dtype == "fp8":
            k, v = (dequantize(*quantize(x), x.dtype) for x in (k, v))
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


class Trial:
    """Runs token ids through all layers; needs an initialised torch.distributed world of one rank."""

    def __init__(self, forward: GptForward, context: StepContext) -> None:
        self._forward, self._context = forward, context

    @classmethod
    def load(cls, checkpoint: str | Path, dtype: torch.dtype = torch.float32) -> Trial:
        """Raises FileNotFoundError or ValueError for a checkpoint that cannot be read."""
        context = StepContext()
        core = functools.partial(SequenceParallelAttention, context=context)
        groups = ParallelGroups.create(ParallelConfig())
        return cls(load_gpt(checkpoint, groups.to_megatron(), core, dtype), context)

    @property
    def model(self) -> ModelConfig:
        return self._forward.model

    @torch.inference_mode()
    def hidden(self, token_ids: list[int], step: AttentionStep, first: int = 0) -> Tensor:
        """Hidden states after the last layer, [s, 1, h], of tokens at positions first, first + 1, ...

        `step` sees every layer's Q, K and V.
        """
        places = torch.arange(first, first + len(token_ids))
        hidden = self._forward.embed(torch.tensor(token_ids)[:, None], places)
        angles = self._forward.angles(places)
        self._context.step = step
        for layer in range(self._forward.num_layers):
            hidden = self._forward.layer(layer, hidden, self._forward.angles_of(layer, angles))
        self._context.step = None
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """[s, 1, h] of `hidden` -> [s, v] fp32."""
        return self._forward.logits(hidden)[:, 0]
