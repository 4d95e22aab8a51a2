"""One file of weights, safetensors or a pickle: names, shapes, and a weight at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints_tools.pickles import load_pickle


class WeightFile(Protocol):
    """An opened file."""

    shapes: dict[str, tuple[int, ...]]

    def fetch(self, name: str) -> Tensor: ...


def open_file(path: Path, trust_pickle: bool) -> WeightFile:
    """Raises ValueError naming the file."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickleFile(path, trust_pickle)


class SafetensorsFile:
    """Opened for every weight: a handle maps the whole file, and its pages would stay."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with safe_open(path, framework="pt") as tensors:
                self.shapes = {
                    name: tuple(tensors.get_slice(name).get_shape())
                    for name in tensors.keys()  # noqa: SIM118, not a dict
                }
        except (SafetensorError, OSError) as error:
            size = path.stat().st_size if path.exists() else 0
            raise ValueError(
                f"{path} ({size} bytes) cannot be read: {error}; fetch the model again"
            ) from error

    def fetch(self, name: str) -> Tensor:
        with safe_open(self._path, framework="pt") as tensors:
            return tensors.get_tensor(name)


class PickleFile:
    """Mapped; one of the time before archives is in memory as a whole."""

    def __init__(self, path: Path, trust_pickle: bool) -> None:
        content = load_pickle(path, trust_pickle=trust_pickle)
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds a {type(content).__name__}, no weights by name")
        self._tensors = {name: each for name, each in content.items() if isinstance(each, Tensor)}
        self.shapes = {name: tuple(each.shape) for name, each in self._tensors.items()}

    def fetch(self, name: str) -> Tensor:
        return self._tensors[name]
