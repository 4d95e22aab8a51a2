"""The module in Megatron's core_attention slot: hands Q, K, V to the attention of the current step.

What the step is (a prefill by some strategy, a decode batch) is set by the runner; a layer never knows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_sps2.attention.kv_cache import KVCache, SlotRun
from megatron_sps2.attention.prefill import STRATEGIES, PrefillShape
from megatron_sps2.attention.strategy import LAYOUTS
from megatron_sps2.parallel.collectives import Wire
from megatron_sps2.parallel.layout import TokenLayout


class AttentionStep(Protocol):
    """One engine step as core attention sees it."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [s/P, b, n/T, d], k and v [s/P, b, n_kv/T, d], roped -> [s/P, b, n/T, d]; layers count from 0."""
        ...


@dataclass(slots=True)
class StepContext:
    """The step that is running now; one per engine, bound into every layer when the model is built."""

    step: AttentionStep | None = None


class SequenceParallelAttention(torch.nn.Module):
    """Megatron's core attention, sequence-parallel; bind `context` by functools.partial."""

    def __init__(self, *, context: StepContext, layer_number: int, **_: Any) -> None:
        super().__init__()
        self._context = context
        self._layer = layer_number - 1

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None = None, **_: Any
    ) -> Tensor:
        """query [s/P, b, n/T, d], key and value [s/P, b, n_kv/T, d] -> [s/P, b, n/T * d]"""
        step = self._context.step
        assert step is not None, "a layer ran outside of an engine step"
        assert attention_mask is None, "the causal mask is implied; attention_mask must be None"
        return step.attend(self._layer, query, key, value).flatten(2)


@dataclass(slots=True, kw_only=True)
class PrefillStep:
    """Attention of one prompt's prefill. Creating it makes room in the cache for this rank's tokens."""

    cache: KVCache
    wire: Wire
    request_id: int
    strategy: str
    num_tokens: int
    num_past: int
    scale: float
    overlap: bool
    layout: TokenLayout = field(init=False)
    _past: list[SlotRun] = field(init=False)
    _new: list[SlotRun] = field(init=False)

    def __post_init__(self) -> None:
        axis, cache = self.wire.axis, self.cache
        self.layout = LAYOUTS[self.strategy](self.num_tokens, axis.size)
        self._past = cache.runs(self.request_id, 0, cache.num_tokens(self.request_id))
        self._new = cache.extend(self.request_id, self.layout.tokens_per_rank[axis.rank])

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [s/P, 1, n, d], k and v [s/P, 1, n_kv, d] -> [s/P, 1, n, d]; K and V stay in this shard."""
        self.cache.write(layer, self._new, k[:, 0], v[:, 0])
        shape = PrefillShape(
            layout=self.layout,
            wire=self.wire,
            scale=self.scale,
            overlap=self.overlap,
            past=self.cache.read(layer, self._past) if self.num_past else None,
        )
        return STRATEGIES[self.strategy](q, k, v, shape)
