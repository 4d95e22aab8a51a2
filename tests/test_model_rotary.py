"""Rotary angles against transformers' Llama."""

from __future__ import annotations

import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from megatron_sps2.model.rotary import rotary_angles
from tests.tiny_llama import hf_config


def test_angles_equal_transformers_at_scattered_positions() -> None:
    positions = torch.tensor([0, 1, 2, 511, 7, 100_000])
    cos, sin = LlamaRotaryEmbedding(hf_config(8, 2))(torch.zeros(1), positions[None])  # [1, s, d]
    angles = rotary_angles(positions, head_dim=8, base=5000.0)
    assert angles.shape == (6, 1, 1, 8) and angles.dtype == torch.float32
    # fp32 angles of order 1e5 are exact to about 1e-2 / 2**24 of a turn in both; both form them alike.
    torch.testing.assert_close(angles.cos()[:, 0, 0], cos[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(angles.sin()[:, 0, 0], sin[0], atol=1e-5, rtol=0)


def test_no_positions_give_no_angles() -> None:
    assert rotary_angles(torch.arange(0), head_dim=64, base=1e4).shape == (0, 1, 1, 64)
