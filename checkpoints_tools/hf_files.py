"""One file of weights, safetensors or a pickle: names, shapes, and a weight at a time."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints_tools.pickles import load_pickle


class WeightFile(Protocol):
    """An opened file."""

    path: Path
    shapes: dict[str, tuple[int, ...]]

    def fetch(self, name: str) -> Tensor: ...


def open_file(path: Path, trust_pickle: bool) -> WeightFile:
    """Raises ValueError naming the file."""
    return SafetensorsFile(path) if path.suffix == ".safetensors" else PickleFile(path, trust_pickle)


class SafetensorsFile:
    """Opened for every weight: a handle maps the whole file, and its pages would stay."""

    def __init__(self, path: Path) -> None:
        self.path = path
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
        with safe_open(self.path, framework="pt") as tensors:
            return tensors.get_tensor(name)


class PickleFile:
    """Mapped; one of the time before archives is in memory as a whole."""

    def __init__(self, path: Path, trust_pickle: bool) -> None:
        self.path = path
        content = load_pickle(path, trust_pickle=trust_pickle)
        if not isinstance(content, dict):
            raise ValueError(f"{path} holds a {type(content).__name__}, no weights by name")
        self._tensors = {name: each for name, each in content.items() if isinstance(each, Tensor)}
        self.shapes = {name: tuple(each.shape) for name, each in self._tensors.items()}

    def fetch(self, name: str) -> Tensor:
        return self._tensors[name]


class FusedFile:
    """A file that holds some weights as one, parts below each other: seen as the parts."""

    def __init__(
        self,
        file: WeightFile,
        fused: Mapping[str, tuple[str, ...]],
        expected: Mapping[str, tuple[int, ...]],
    ) -> None:
        """fused: as in families.py. expected: the shapes of the parts, by their whole names.

        Raises ValueError naming the file and the weight that has not the rows of its parts.
        """
        self.path, self._file = file.path, file
        self.shapes = dict(file.shapes)
        self._places: dict[str, tuple[str, int]] = {}  # of a part: its weight, its first row there
        for name in file.shapes:
            rows = {part: expected[part][0] for part in _part_names(name, fused) if part in expected}
            if rows:
                self._cut(name, rows)

    def _cut(self, name: str, rows: Mapping[str, int]) -> None:
        shape = self.shapes.pop(name)
        if shape[:1] != (sum(rows.values()),):
            raise ValueError(
                f"{self.path}: {name} has shape {shape}, expected {sum(rows.values())} rows, those of "
                f"{', '.join(rows)}"
            )
        for (part, count), end in zip(rows.items(), accumulate(rows.values()), strict=True):
            self.shapes[part] = (count, *shape[1:])
            self._places[part] = name, end - count

    def fetch(self, name: str) -> Tensor:
        if name not in self._places:
            return self._file.fetch(name)
        whole, first = self._places[name]
        return self._file.fetch(whole)[first : first + self.shapes[name][0]]


def _part_names(name: str, fused: Mapping[str, tuple[str, ...]]) -> list[str]:
    """None for a weight that is not fused."""
    return [
        name.replace(f".{whole}.", f".{part}.")
        for whole, parts in fused.items()
        if f".{whole}." in name
        for part in parts
    ]
