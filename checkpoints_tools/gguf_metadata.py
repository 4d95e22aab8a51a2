"""A GGUF file's metadata: keys looked up by name; one of the architecture that nobody asks for is refused.

Knows no tensor; gguf_config.py knows what the keys mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import ReaderField

# By general.architecture, which is the model_type of config.json; Mistral calls itself llama.
ARCHITECTURES = ("llama", "qwen2", "qwen3", "smollm3", "gpt2")

# Values that say what is so anyway.
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "rope.scaling.attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "tensor_data_layout": ("Meta AI original pth",),
}
# Nothing is computed from these; the epsilon of the norms that the architecture has is read.
_SILENT = (
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "rope.scaling.finetuned",
    "vocab_size",
)
_REASONS = {
    "expert_count": "mixtures of experts are not supported",
    "pooling_type": "the model makes embeddings, not text",
    "rope.scaling.yarn_attn_factor": "llama.cpp and its converter do not mean the same by it",
}


class Metadata:
    """A file's keys; those of its architecture without its prefix. Whatever was asked for is understood."""

    def __init__(self, path: Path, fields: Mapping[str, ReaderField]) -> None:
        """Raises ValueError when the file is no whole model of a served architecture."""
        self.path = path
        self._fields = fields
        self._understood = set(_SILENT)
        self.architecture = str(self.of_file("general.architecture"))
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"{path}: general.architecture={self.architecture!r} is not supported; only "
                f"{', '.join(ARCHITECTURES)} are"
            )
        if (kind := self.of_file("general.type", "model")) != "model":
            raise ValueError(f"{path}: general.type={kind!r} is not supported; only 'model' is")
        if (count := self.of_file("split.count", 0)) > 1:
            raise ValueError(f"{path} is one of {count} files; join them with llama.cpp's llama-gguf-split")

    def of_file(self, key: str, default: Any = None) -> Any:
        field = self._fields.get(key)
        value = default if field is None else field.contents()
        return _as_written(value) if isinstance(value, float) else value

    def optional(self, key: str, default: Any = None) -> Any:
        """Raises ValueError for a list, one value a layer, that are not all the same."""
        self._understood.add(key)
        value = self.of_file(f"{self.architecture}.{key}", default)
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            raise self.refusal(key, value, "it is not the same in every layer")
        return value[0]

    def required(self, key: str) -> Any:
        value = self.optional(key)
        if value is None:
            name = f"{self.architecture}.{key}"
            raise ValueError(f"{self.path} has no metadata {name!r}, which a {self.architecture} model needs")
        return value

    def refusal(self, key: str, value: Any, reason: str) -> ValueError:
        return ValueError(f"{self.path}: {self.architecture}.{key}={value!r} is not supported: {reason}")

    def check_understood(self) -> None:
        """Raises ValueError for a key of the architecture that nothing asked for and that is not harmless."""
        prefix = f"{self.architecture}."
        keys = (name.removeprefix(prefix) for name in self._fields if name.startswith(prefix))
        for key in keys:
            value = self.of_file(prefix + key)
            if key not in self._understood and value not in _HARMLESS.get(key, ()):
                raise self.refusal(key, value, _REASONS.get(key, "nothing here computes what it says"))


def _as_written(value: float) -> float:
    """An fp32 number of the file -> the decimal it was written from (9.99999974e-06 -> 1e-05)."""
    return float(str(np.float32(value)))
