"""Writes a Hugging Face folder: config.json, sharded safetensors with their index, tokenizer files."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoints_tools.hf import INDEX
from checkpoints_tools.hf_config import hf_config
from checkpoints_tools.source import Source
from checkpoints_tools.target import Progress, whole_folder
from megatron_sps2.config import DType
from megatron_sps2.model.weights import hf_shapes

SHARD_BYTES = 2 << 30


def write_hf(
    source: Source, target: Path, dtype: DType, progress: Progress, *, shard_bytes: int = SHARD_BYTES
) -> None:
    """The folder `target`, whole or not at all. One shard is in memory at a time."""
    kind = getattr(torch, dtype)
    shards = _shards(hf_shapes(source.model), kind.itemsize, shard_bytes)
    count, done = sum(map(len, shards)), 0
    with whole_folder(target) as folder:
        file_of: dict[str, str] = {}
        for number, names in enumerate(shards, start=1):
            file = (
                f"model-{number:05}-of-{len(shards):05}.safetensors"
                if len(shards) > 1
                else "model.safetensors"
            )
            tensors: dict[str, Tensor] = {}
            for name in names:
                tensors[name] = source.fetch(name).to(kind).contiguous()
                done += 1
                progress("weights", done, count)
            save_file(tensors, folder / file, metadata={"format": "pt"})
            file_of.update(dict.fromkeys(names, file))
        if len(shards) > 1:
            total = sum((folder / file).stat().st_size for file in set(file_of.values()))
            _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": file_of})
        _write_json(folder / "config.json", hf_config(source.model, dtype))
        _write_json(folder / "generation_config.json", _generation(source))
        source.save_tokenizer(folder)


def _shards(shapes: dict[str, tuple[int, ...]], itemsize: int, most: int) -> list[list[str]]:
    """Names in order, cut where a file would grow beyond `most` bytes."""
    shards, size = [list[str]()], 0
    for name, shape in shapes.items():
        num_bytes = itemsize * int(torch.Size(shape).numel())
        if shards[-1] and size + num_bytes > most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += num_bytes
    return shards


def _generation(source: Source) -> dict[str, object]:
    return {"bos_token_id": source.model.bos_token_id, "eos_token_id": list(source.model.eos_token_ids)}


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
