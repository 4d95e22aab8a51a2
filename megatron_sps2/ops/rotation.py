"""Rotary position embedding, as Megatron turns queries and keys. Knows angles, not positions.

Non-interleaved: numbers i and i + r/2 of a head turn together; those from r on, if any, stay as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosines and sines `[s, r]` of tokens, rounded to the dtype of what is turned, as Megatron does it.

    Made once for all layers of a step: taking them of every layer would cost more than turning.
    """

    cos: Tensor
    sin: Tensor

    @classmethod
    def of(cls, angles: Tensor, dtype: torch.dtype) -> Rotation:
        """angles `[s, r]`, or `[s, 1, 1, r]` as Megatron has them, in radians, fp32."""
        angles = angles.flatten(0, -2)
        return cls(angles.cos().to(dtype), angles.sin().to(dtype))


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """`[s, n, d]` -> `[s, n, d]`, a new tensor; to the bit what Megatron's apply_rotary_pos_emb gives."""
    turned, rest = x.tensor_split((rotation.cos.shape[-1],), dim=-1)
    first, second = turned.chunk(2, dim=-1)
    partners = torch.cat((-second, first), dim=-1)
    turned = turned * rotation.cos.unsqueeze(1) + partners * rotation.sin.unsqueeze(1)
    return torch.cat((turned, rest), dim=-1)
