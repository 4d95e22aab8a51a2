"""What the measurements ran on."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("triton", "megatron-core", "flash-attn", "flash-attn-3", "deepspeed", "transformers")


def machine(device: torch.device) -> dict[str, Any]:
    """Facts by name; None where there is no such thing."""
    return {
        "commit": _said("git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        **{package: _version(package) for package in PACKAGES},
        **(_card(device) if device.type == "cuda" else {"device": "cpu: kernels in Triton's interpreter"}),
    }


def _card(device: torch.device) -> dict[str, Any]:
    card = torch.cuda.get_device_properties(device)
    asked = "driver_version,clocks.sm,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
    return {
        "device": card.name,
        "capability": f"{card.major}.{card.minor}",
        "multiprocessors": card.multi_processor_count,
        "memory_bytes": card.total_memory,
        "l2_bytes": card.L2_cache_size,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        asked: _said("nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _said(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
