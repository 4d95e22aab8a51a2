"""float8 with a scale for each row, as the KV cache keeps it. Knows tensors only.

A row's bytes follow from that row alone: the same on any rank, in any chunk, whatever was cached before.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = torch.finfo(torch.float8_e4m3fn).max  # 448
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # no scale is 0: rows of zeros come back as zeros


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """x `[..., d]` -> float8_e4m3fn `[..., d]` and fp32 scales `[...]`; the largest number becomes 448.

    A row with a NaN or an infinity comes back as NaN throughout, by a scale of NaN or infinity (which makes 0
    of a finite number, and NaN of that 0 again): what is poisoned is never made finite.
    """
    rows = x.float()
    scales = (rows.abs().amax(dim=-1) / LARGEST).clamp_min(SMALLEST_SCALE)
    return (rows / scales.unsqueeze(-1)).to(torch.float8_e4m3fn), scales


def dequantize(stored: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """float8_e4m3fn `[..., d]` and fp32 scales `[...]` -> numbers `[..., d]`, multiplied in fp32."""
    return (stored.float() * scales.unsqueeze(-1)).to(dtype)
