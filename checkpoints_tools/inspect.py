"""What a checkpoint is, from its index and config alone: no weight is read."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from checkpoints_tools.convert import open_source
from checkpoints_tools.core import CoreSource
from checkpoints_tools.gguf import GgufSource
from checkpoints_tools.legacy import LegacySource
from checkpoints_tools.llama2c import Llama2cSource
from checkpoints_tools.source import Source, check_weights
from megatron_sps2.config import divisors
from megatron_sps2.model.manifest import MANIFEST_NAME, read_manifest
from megatron_sps2.model.weights import hf_shapes

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


def inspect(path: str | Path, *, trust_pickle: bool = False) -> dict[str, Any]:
    """Plain values, ready for JSON. Raises as `convert` does for what cannot be read or does not fit."""
    folder = Path(path)
    source = open_source(folder, trust_pickle=trust_pickle)
    check_weights(source)
    model, shapes = source.model, hf_shapes(source.model)
    num_params = sum(torch.Size(shape).numel() for shape in shapes.values())
    manifest = read_manifest(folder) if (folder / MANIFEST_NAME).is_file() else None
    heads = model.num_attention_heads, model.num_query_groups, model.ffn_hidden_size
    return {
        "path": str(folder),
        "format": _format(source),
        "dtype": source.dtype,
        "num_params": num_params,
        "num_weights": len(shapes),
        "bytes_on_disk": _size(folder),
        "shards": _shards(source),
        "content_id": manifest.content_id if manifest else None,
        "tokenizer": next((name for name in TOKENIZERS if (folder / name).is_file()), None),
        "chat_template": (folder / "chat_template.jinja").is_file(),
        "tp_sizes": divisors(*heads),
        "model": asdict(model),
    }


def _format(source: Source) -> str:
    names: dict[type, str] = {
        CoreSource: "megatron",
        GgufSource: "gguf",
        Llama2cSource: "llama2.c",
    }
    return source.format if isinstance(source, LegacySource) else names.get(type(source), "hf")


def _shards(source: Source) -> dict[str, int] | None:
    return source.grid if isinstance(source, LegacySource) else None


def _size(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())
