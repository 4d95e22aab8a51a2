"""Weights in mapped files, which the system can write back when memory runs short."""

from __future__ import annotations

import secrets
from pathlib import Path

import torch
from torch import Tensor


def on_disk(tensor: Tensor, folder: Path) -> Tensor:
    """A copy in a mapped file of `folder`.

    The file has no name any more: it lives as long as it is mapped, and no longer.
    """
    path = folder / secrets.token_hex(8)
    mapped = torch.from_file(str(path), shared=True, size=tensor.numel(), dtype=tensor.dtype)
    path.unlink()
    return mapped.view(tensor.shape).copy_(tensor)
