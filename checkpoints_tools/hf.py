"""Reads a Hugging Face folder: config.json, *.safetensors (one file or a sharded index), tokenizer files.

Knows the folder's layout; families.py knows what its config means.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from checkpoints_tools.families import model_config
from checkpoints_tools.tokenizer_files import copy_tokenizer
from megatron_sps2.config import DTYPES, DType

INDEX = "model.safetensors.index.json"
# Buffers that older exports carry and that follow from the config.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; a Hugging Face model folder has one") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); fetch the model again") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{path} holds a {type(content).__name__}, expected a JSON object; fetch the model again"
        )
    return content


class HfSource:
    """A folder with config.json and *.safetensors. Weights are read one by one as they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        config = _read_json(folder / "config.json")
        generation = folder / "generation_config.json"
        self.model = model_config(
            config, folder / "config.json", _read_json(generation) if generation.exists() else {}
        )
        named = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        if named not in DTYPES:
            raise ValueError(f"{folder / 'config.json'}: dtype={named!r} is not one of {', '.join(DTYPES)}")
        self.dtype = cast(DType, named)
        self._files = _weight_files(folder)
        self._shapes, self._file_of = self._scan()

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def _scan(self) -> tuple[dict[str, tuple[int, ...]], dict[str, Path]]:
        shapes: dict[str, tuple[int, ...]] = {}
        file_of: dict[str, Path] = {}
        for path in self._files:
            with _open(path) as tensors:
                for name in tensors.keys():  # noqa: SIM118, not a dict
                    if self._is_wanted(name):
                        shapes[name] = tuple(tensors.get_slice(name).get_shape())
                        file_of[name] = path
        return shapes, file_of

    def _is_wanted(self, name: str) -> bool:
        # A tied model uses the embedding whatever lm_head says, as transformers does.
        redundant = self.model.tie_embeddings and name == "lm_head.weight"
        return not redundant and not name.endswith(IGNORED_SUFFIXES)

    def fetch(self, name: str) -> Tensor:
        with _open(self._file_of[name]) as tensors:
            return tensors.get_tensor(name)

    def save_tokenizer(self, folder: Path) -> None:
        copy_tokenizer(self.path, folder)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size if path.exists() else 0
        raise ValueError(f"{path} ({size} bytes) cannot be read: {error}; fetch the model again") from error


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the folder: those of the index where there is one, else all."""
    if not (folder / INDEX).exists():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"{folder} has no *.safetensors file; other weight formats are not read")
        return files
    listed = sorted(set(_read_json(folder / INDEX).get("weight_map", {}).values()))
    outside = [name for name in listed if Path(name).name != name]
    if outside:
        raise ValueError(f"{folder / INDEX} names {outside[0]!r}, which is outside {folder}; it is not read")
    missing = [name for name in listed if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder / INDEX} names {missing}, not found in {folder}; fetch the model again"
        )
    return [folder / name for name in listed]
