"""transformers with keys and values rounded to float8 before it attends: the reference of an fp8 KV cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "rounded_sdpa"


def round_keys_and_values(hf: PreTrainedModel) -> None:
    """From now on; keys once they are turned, each token and KV head by its own largest number."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    hf.set_attn_implementation(NAME)


def _attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **more: Any) -> Any:
    return sdpa_attention_forward(module, query, rounded(key), rounded(value), *args, **more)


def rounded(x: Tensor) -> Tensor:
    """fp32 [..., d], row by row, in plain steps."""
    scale = x.abs().max(dim=-1, keepdim=True).values / 448
    return (x / scale).to(torch.float8_e4m3fn).to(torch.float32) * scale
