"""Reads a Hugging Face folder: config.json, weights in one file or several with an index, tokenizer.

Knows the folder's layout; families.py knows what its config means.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from checkpoints_tools.families import FAMILIES, model_config
from checkpoints_tools.hf_files import FusedFile, WeightFile, open_file
from checkpoints_tools.tokenizer_files import copy_tokenizer
from megatron_sps2.config import DTYPES, DType
from megatron_sps2.model.weights import hf_shapes

INDEX = "model.safetensors.index.json"
INDEXES = (INDEX, "pytorch_model.bin.index.json")
# Buffers that older exports carry and that follow from the config.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")


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
    """A folder with config.json and *.safetensors or *.bin. A weight is read when it is asked for."""

    def __init__(self, folder: Path, *, trust_pickle: bool = False) -> None:
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
        files: list[WeightFile] = [open_file(path, trust_pickle) for path in _weight_files(folder)]
        if fused := FAMILIES[config["model_type"]].fused:
            files = [FusedFile(file, fused, hf_shapes(self.model)) for file in files]
        self._places = {_full_name(name): (file, name) for file in files for name in file.shapes}
        self._shapes = {
            name: file.shapes[theirs]
            for name, (file, theirs) in self._places.items()
            if self._is_wanted(name)
        }

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self._shapes

    def _is_wanted(self, name: str) -> bool:
        # A tied model uses the embedding whatever lm_head says, as transformers does.
        redundant = self.model.tie_embeddings and name == "lm_head.weight"
        return not redundant and not name.endswith(IGNORED_SUFFIXES)

    def fetch(self, name: str) -> Tensor:
        file, theirs = self._places[name]
        return file.fetch(theirs)

    def save_tokenizer(self, folder: Path) -> None:
        copy_tokenizer(self.path, folder)


def _full_name(name: str) -> str:
    """GPT-2's first checkpoints were saved without their head, and so without its prefix."""
    return f"transformer.{name}" if name.startswith(("wte.", "wpe.", "h.", "ln_f.")) else name


def _weight_files(folder: Path) -> list[Path]:
    """Those of the index where there is one, else all; safetensors before pickles."""
    index = next((folder / name for name in INDEXES if (folder / name).exists()), None)
    if index is None:
        for pattern in ("*.safetensors", "pytorch_model*.bin"):
            if files := sorted(folder.glob(pattern)):
                return files
        raise FileNotFoundError(f"{folder} has no *.safetensors and no pytorch_model*.bin file")
    listed = sorted(set(_read_json(index).get("weight_map", {}).values()))
    outside = [name for name in listed if Path(name).name != name]
    if outside:
        raise ValueError(f"{index} names {outside[0]!r}, which is outside {folder}; it is not read")
    missing = [name for name in listed if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"{index} names {missing}, not found in {folder}; fetch the model again")
    return [folder / name for name in listed]
