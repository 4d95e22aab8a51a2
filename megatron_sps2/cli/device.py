"""The kind of device that --device means on this host."""

from __future__ import annotations


def device_kind(wanted: str) -> str:
    """'cpu' or 'cuda', for the flag or the device picked by it. Raises ValueError for a missing device."""
    import torch

    count = torch.cuda.device_count() if wanted != "cpu" else 0
    if wanted.startswith("cuda") and count == 0:
        raise ValueError(f"--device {wanted}: this host has 0 CUDA devices; use --device cpu")
    return "cuda" if count else "cpu"
