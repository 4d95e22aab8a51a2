"""Gemma's norms: their weights are stored less 1, and attention and MLP end with one.

Knows Megatron's slots: a norm after a sublayer lives in that of its last linear.
"""

from __future__ import annotations

from typing import Any

import megatron_sps2.model.eager  # noqa: F401  # isort: skip  # before anything of Megatron

import torch
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class GemmaNorm(nn.Module):
    """RMSNorm in fp32, times 1 + weight, which is never stored: bf16 would lose most of the weight."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """[..., h] -> [..., h] in x's dtype."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (normed * (1 + self.weight.float())).to(x.dtype)


def with_norm(linear: type[RowParallelLinear]) -> type[RowParallelLinear]:
    """A row-parallel linear whose output, added up over the tp ranks, is normed."""

    class NormedRowParallelLinear(linear):
        def __init__(self, *args: Any, config: TransformerConfig, **kwargs: Any) -> None:
            super().__init__(*args, config=config, **kwargs)
            self.post_layernorm = GemmaNorm(config, self.output_size, config.layernorm_epsilon)

        def forward(self, input_: Tensor) -> tuple[Tensor, None]:
            output, _bias = super().forward(input_)
            return self.post_layernorm(output), None

    return NormedRowParallelLinear
