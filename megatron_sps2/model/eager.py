"""Megatron's first import, without the compiler: ranks start in half the time.

Megatron hands some fusions to torch.compile as it is imported, and that loads TorchInductor, which takes
longer than all of Megatron. No fusion runs here (see spec.py). Import this before anything of Megatron.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch


def _as_it_is(function: Callable[..., Any] | None = None, **_: Any) -> Any:
    """torch.compile's signature, as function and as decorator; compiles nothing."""
    return (lambda decorated: decorated) if function is None else function


if "megatron.core" not in sys.modules:
    # A host with CUDA's tools and no GPU is told so by a module that Megatron imports and nobody uses here.
    quiet = mock.patch.object(logging.getLogger("torch.utils.cpp_extension"), "disabled", True)
    with quiet, mock.patch.object(torch, "compile", _as_it_is):
        import megatron.core.models.gpt.gpt_model  # noqa: F401
