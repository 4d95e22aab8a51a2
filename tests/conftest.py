"""Fixtures shared by all tests: the real model, where it has been fetched."""

from __future__ import annotations

import os
from collections import Counter
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from megatron_sps2.parallel import garbage

garbage.look_less()

# Kernels without a device run in Triton's interpreter; it asks for this when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Workers share the cores; a thread each, as waiting threads spin.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def cache_folder() -> Path:
    """Where `make model` puts SmolLM2."""
    return Path(os.environ.get("SPS2_CACHE", "~/.cache/megatron_sps2")).expanduser()


def _existing(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"{path} is absent; `make model` fetches and converts SmolLM2")
    return path


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as GGUF."""
    return _existing(cache_folder() / "SmolLM2-135M-Instruct.Q4_1.gguf")


@pytest.fixture(scope="session")
def smollm2_checkpoint() -> Path:
    """SmolLM2-135M-Instruct converted to a Megatron checkpoint folder."""
    return _existing(cache_folder() / "SmolLM2-135M-Instruct")


def _interpreter_trouble() -> str | None:
    """Why no kernel with a loop runs in Triton's interpreter here; None where they do."""
    if os.environ.get("TRITON_INTERPRET") != "1" or not all(map(find_spec, ("triton", "numpy"))):
        return None
    triton, numpy = (tuple(map(int, version(name).split(".")[:2])) for name in ("triton", "numpy"))
    if triton <= (3, 6) and numpy >= (2, 4):
        return "the interpreter of Triton 3.6 fails with NumPy 2.4: docs/gpu.md"
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, then those with many: what is begun last should be over soon.

    One that takes minutes would keep one worker busy at the end while the other has nothing left.
    """
    trouble = _interpreter_trouble()
    for item in items:
        if trouble and item.get_closest_marker("triton"):
            item.add_marker(pytest.mark.skip(reason=trouble))
    counts = Counter(item.path for item in items)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, -counts[item.path], item.path))
