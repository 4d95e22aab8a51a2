"""Fixtures shared by all tests: the real model, where it has been fetched."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
import torch

# Kernels without a device run in Triton's interpreter; it asks for this when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first, then those with many: what is begun last should be over soon.

    One that takes minutes would keep one worker busy at the end while the other has nothing left.
    """
    counts = Counter(item.path for item in items)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: (item.path not in slow, -counts[item.path], item.path))
