"""Which versions are installed here: what is shown of one process, and what ranks are compared by."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    *("megatron_sps2", "torch", "numba", "megatron-core", "deepspeed", "mpi4py", "transformers"),
    "sentencepiece",
)
# What computes, and must be the same on every rank.
COMPARED = ("megatron_sps2", "torch", "numba", "megatron-core", "numpy", "transformers")
MISSING = "not installed"


def installed() -> dict[str, str]:
    found = {"python": platform.python_version(), **{package: _version(package) for package in PACKAGES}}
    found["NVIDIA apex"] = "fused norm found" if _has_fused_norm() else "not found (optional)"
    return found


def versions() -> dict[str, str]:
    """Of what ranks must have alike; CUDA's and NCCL's where there is a device."""
    import torch

    found = {"python": platform.python_version(), **{package: _version(package) for package in COMPARED}}
    if torch.cuda.is_available():
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return MISSING


def _has_fused_norm() -> bool:
    try:
        from apex.normalization import FusedRMSNorm  # noqa: F401
    except ImportError:
        return False
    return True
