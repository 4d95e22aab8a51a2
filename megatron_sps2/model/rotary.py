"""Rotary angles for positions in any order.

Knows positions and frequencies, not ranks: whoever holds a token gives its place in the whole sequence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_sps2.config import RopeScaling


def rotary_angles(
    positions: Tensor, head_dim: int, base: float, scaling: RopeScaling | None = None
) -> Tensor:
    """[s] integer positions -> [s, 1, 1, head_dim] angles in radians, fp32, as Megatron's rotary code wants.

    Non-interleaved: dims i and i + head_dim/2 turn together, so the angles of the first half are repeated.
    """
    frequencies = inverse_frequencies(head_dim, base, scaling).to(positions.device)
    return turned_by(positions, frequencies)


def turned_by(positions: Tensor, frequencies: Tensor) -> Tensor:
    """As rotary_angles, from inverse_frequencies that lie on the positions' device: nothing is copied."""
    half = torch.outer(positions.float(), frequencies)  # [s, d/2]
    return torch.cat((half, half), dim=-1)[:, None, None, :]


def inverse_frequencies(head_dim: int, base: float, scaling: RopeScaling | None = None) -> Tensor:
    """[head_dim/2] radians that each pair of dims turns from one position to the next."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    plain = 1.0 / (base**exponents)
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    return plain * (_llama3 if scaling.kind == "llama3" else _yarn)(plain, head_dim, base, scaling)


def _llama3(plain: Tensor, head_dim: int, base: float, scaling: RopeScaling) -> Tensor:
    """Between the two wave lengths the share that is kept falls evenly with the number of turns."""
    turns = scaling.original_max_seq_len * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept + (1 - kept) / scaling.factor


def _yarn(plain: Tensor, head_dim: int, base: float, scaling: RopeScaling) -> Tensor:
    """YaRN (arXiv 2309.00071), section 3.2: a ramp over dimensions between two numbers of turns."""

    def dimension(turns: float) -> float:
        ratio = scaling.original_max_seq_len / (turns * 2 * math.pi)
        return head_dim * math.log(ratio) / (2 * math.log(base))

    first, last = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    ramp = (torch.arange(head_dim // 2).float() - first) / max(last - first, 1e-3)
    kept = 1 - ramp.clamp(0, 1)
    return kept + (1 - kept) / scaling.factor
