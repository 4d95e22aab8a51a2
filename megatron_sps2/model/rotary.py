"""Rotary angles for positions in any order.

Knows positions and a base, not ranks: whoever holds a token gives its place in the whole sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_angles(positions: Tensor, head_dim: int, base: float) -> Tensor:
    """[s] integer positions -> [s, 1, 1, head_dim] angles in radians, fp32, as Megatron's rotary code wants.

    Non-interleaved: dims i and i + head_dim/2 turn together, so the angles of the first half are repeated.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=positions.device).float() / head_dim
    inverse_frequencies = 1.0 / (base**exponents)  # [d/2]
    half = torch.outer(positions.float(), inverse_frequencies)  # [s, d/2]
    return torch.cat((half, half), dim=-1)[:, None, None, :]
