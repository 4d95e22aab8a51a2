"""The project's kernels by name; each is imported by the case that needs it, and may be absent."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from benchmarks.gpu.case import Absent


def kernel(module: str, name: str) -> Any:
    """`megatron_sps2.ops.kernels.<module>.<name>`."""
    return operation(f"kernels.{module}", name)


def operation(module: str, name: str) -> Any:
    """`megatron_sps2.ops.<module>.<name>`. Raises Absent where it is not written, or triton not installed."""
    return optional(f"megatron_sps2.ops.{module}", name)


def optional(module: str, name: str) -> Any:
    """Raises Absent where the module, or one that it imports, is not there, or has no such name."""
    try:
        found = import_module(module)
    except ModuleNotFoundError as error:
        raise Absent(f"{name} of {module}: no module {error.name}") from error
    if not hasattr(found, name):
        raise Absent(f"{module} has no {name}")
    return getattr(found, name)
