"""What every converter reads from: a model's shape, its weights under Hugging Face names, its tokenizer.

Knows no file format; hf.py and gguf.py do.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from megatron_sps2.config import DTYPES, DType, ModelConfig
from megatron_sps2.model.weights import hf_shapes


class Source(Protocol):
    """An opened model to convert from."""

    path: Path
    model: ModelConfig
    dtype: DType  # what the weights are converted to unless the user says otherwise

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every weight in the files, by Hugging Face name."""
        ...

    def fetch(self, name: str) -> Tensor:
        """One weight, as Hugging Face lays it out."""
        ...

    def save_tokenizer(self, folder: Path) -> None:
        """Puts tokenizer.json, tokenizer_config.json and what belongs to them into `folder`."""
        ...


def check_weights(source: Source) -> None:
    """Raises ValueError naming weights that are missing, unexpected or of a shape the config does not say."""
    expected = hf_shapes(source.model)
    found = source.shapes
    complaints = [f"{name} {shape} is missing" for name, shape in expected.items() if name not in found]
    complaints += [f"{name} {shape} is unexpected" for name, shape in found.items() if name not in expected]
    complaints += [
        f"{name} has shape {found[name]}, expected {shape}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    if complaints:
        shown = "; ".join(complaints[:8]) + (
            f"; and {len(complaints) - 8} more" if len(complaints) > 8 else ""
        )
        raise ValueError(f"the weights in {source.path} do not fit its config: {shown}")


class CheckedSource:
    """A source whose every weight is looked at as it passes: numbers, and of a kind that is served."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.path, self.model, self.dtype = source.path, source.model, source.dtype

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._source.shapes

    def fetch(self, name: str) -> Tensor:
        """Raises ValueError naming the files and the weight."""
        weight = self._source.fetch(name)
        kind = str(weight.dtype).removeprefix("torch.")
        if kind not in DTYPES:
            raise ValueError(f"{self.path}: {name} is of dtype {kind}; only {', '.join(DTYPES)} are read")
        num_bad = int((~torch.isfinite(weight)).sum())
        if num_bad:
            raise ValueError(
                f"{self.path}: {num_bad} of {weight.numel()} values of {name} are NaN or infinite; the file "
                "is damaged, or its training failed"
            )
        return weight

    def save_tokenizer(self, folder: Path) -> None:
        self._source.save_tokenizer(folder)
