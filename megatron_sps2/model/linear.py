"""Linear layers on CPU: Megatron's parallel linears with oneDNN's packed weights underneath.

Knows one matrix product; the tp axis stays Megatron's business.
"""

from __future__ import annotations

import platform

import megatron_sps2.model.eager  # noqa: F401  # isort: skip  # before anything of Megatron

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn

# Rows a weight is laid out for. From 16 on the layout is the same, and fast for 1 to thousands of rows.
PACK_FOR_ROWS = 16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., k], weight [n, k] plain or packed, bias [n] -> [..., n]."""
    if weight.is_mkldnn:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class CpuColumnParallelLinear(ColumnParallelLinear):
    """Megatron's column-parallel linear whose product accepts a packed weight."""

    def _forward_impl(
        self, input: Tensor, weight: Tensor, *args: object, bias: Tensor | None = None, **kwargs: object
    ) -> Tensor:
        return linear(input, weight, bias)


class CpuRowParallelLinear(RowParallelLinear):
    """Megatron's row-parallel linear whose product accepts a packed weight."""

    def _forward_impl(
        self, input: Tensor, weight: Tensor, *args: object, bias: Tensor | None = None, **kwargs: object
    ) -> Tensor:
        return linear(input, weight, bias)


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN's packed layout is tried and faster here: x86 CPU, fp32 or bf16."""
    on_x86 = weight.device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64")
    if not on_x86 or weight.is_mkldnn or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype is torch.float32


def pack(weight: Tensor) -> Tensor:
    """[n, k] -> the same matrix in oneDNN's blocked layout; where that is not possible, `weight` itself."""
    if not can_pack(weight):
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), PACK_FOR_ROWS)


def pack_linears(gpt: GPTModel) -> None:
    """Packs the weights of all layers' linears in place. Load them before; they cannot be saved after."""
    for module in gpt.modules():
        if isinstance(module, (CpuColumnParallelLinear, CpuRowParallelLinear)):
            module.weight = nn.Parameter(pack(module.weight), requires_grad=False)
