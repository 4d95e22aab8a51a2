"""Reads a Hugging Face folder: config.json, *.safetensors (one file or a sharded index), tokenizer files.

Knows the folder's layout and which Llama variants the model floor computes; refuses the others by name.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megatron_sps2.config import DTYPES, DType, ModelConfig

logger = logging.getLogger(__name__)

ARCHITECTURES = ("llama", "mistral")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "tokenizer.model", "vocab.json", "merges.txt"),
)
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


def _rotary_base(config: Mapping[str, Any], path: Path) -> float:
    """rope_theta, wherever this version of transformers wrote it. Raises ValueError for scaled positions."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(
            f"{path}: rope_scaling of type {kind!r} is not supported; only 'default' positions are"
        )
    _refuse(path, {"partial_rotary_factor": (1, 1.0)}, {**config, **rope})
    return float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))


def _refuse(path: Path, allowed: Mapping[str, tuple[Any, ...]], config: Mapping[str, Any]) -> None:
    for name, values in allowed.items():
        found = config.get(name)
        if found is not None and found not in values:
            raise ValueError(
                f"{path}: {name}={found!r} is not supported; only {' or '.join(map(repr, values))} is"
            )


def _check_supported(config: Mapping[str, Any], path: Path) -> None:
    if config.get("model_type") not in ARCHITECTURES:
        raise ValueError(
            f"{path}: model_type={config.get('model_type')!r} is not supported; "
            f"only {' and '.join(ARCHITECTURES)} are"
        )
    allowed = {"hidden_act": ("silu", "swish"), "attention_bias": (False,), "mlp_bias": (False,)}
    _refuse(path, allowed, config)
    _refuse(path, {"layer_types": (["full_attention"] * int(config.get("num_hidden_layers", 0)),)}, config)
    if config.get("quantization_config"):
        raise ValueError(f"{path}: quantization_config is not supported; convert from the unquantised model")
    window, length = config.get("sliding_window"), int(config.get("max_position_embeddings", 0))
    if window is not None and window < length:
        raise ValueError(
            f"{path}: sliding_window={window} is not supported, every token sees all earlier ones; "
            f"set max_position_embeddings={window} to stay inside the window"
        )


def model_config(config: Mapping[str, Any], path: Path, generation: Mapping[str, Any]) -> ModelConfig:
    """config.json, generation_config.json -> ModelConfig. Raises ValueError naming what is not supported."""
    _check_supported(config, path)
    try:
        heads = int(config["num_attention_heads"])
        return ModelConfig(
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=int(config["hidden_size"]),
            ffn_hidden_size=int(config["intermediate_size"]),
            num_attention_heads=heads,
            num_query_groups=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            vocab_size=int(config["vocab_size"]),
            max_seq_len=int(config["max_position_embeddings"]),
            norm_epsilon=float(config["rms_norm_eps"]),
            rotary_base=_rotary_base(config, path),
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=_ids(generation.get("eos_token_id", config.get("eos_token_id"))),
        )
    except KeyError as error:
        raise ValueError(f"{path} has no {error.args[0]!r}, which a Llama model needs") from None


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


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
        for name in TOKENIZER_FILES:
            if (self.path / name).is_file():
                shutil.copyfile(self.path / name, folder / name)
        if not (folder / "tokenizer.json").exists() and not (folder / "tokenizer.model").exists():
            logger.warning("%s has no tokenizer; the checkpoint will take token ids only", self.path)


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
    missing = [name for name in listed if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder / INDEX} names {missing}, not found in {folder}; fetch the model again"
        )
    return [folder / name for name in listed]
