"""float8 with a scale for each row, as the KV cache keeps it. Knows tensors only.

A row's bytes follow from that row alone: the same on any rank, in any chunk, whatever was cached before.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The largest number of float8_e4m3fn.
LARGEST = 448.0
# Of a row whose numbers are all smaller: its scale is still a normal number, and zeros come back as zeros.
LEAST_TOP = LARGEST * torch.finfo(torch.float32).tiny


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """`[..., d]` -> float8_e4m3fn `[..., d]`, scales fp32 `[...]`; a row is what it holds times its scale.

    The largest number of a row becomes 448. A row with NaN or an infinity comes back as NaN, all of it.
    """
    numbers = x.float()
    top = numbers.abs().amax(dim=-1).clamp_min(LEAST_TOP)
    scales = top / top.new_full((), LARGEST)  # by a number CUDA multiplies with its rounded reciprocal
    return (numbers / scales.unsqueeze(-1)).to(torch.float8_e4m3fn), scales


def dequantize(x: Tensor, scales: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """float8_e4m3fn `[..., d]`, scales `[...]` -> numbers `[..., d]`, multiplied in fp32."""
    return (x.float() * scales.unsqueeze(-1)).to(dtype)
