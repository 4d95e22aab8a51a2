"""Megatron's older checkpoints: iter_NNNNNNN/mp_rank_TT[_PPP]/model_optim_rng.pt, tp and pp merged.

Reads core's names (flat), Transformer Engine's, and those before core (language_model.encoder); writing is
legacy_writer.py's. A file is a pickle: it is read without running any code unless the user says otherwise.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.core import newest_iteration
from checkpoints_tools.legacy_args import model_config
from checkpoints_tools.pickles import load_pickle
from checkpoints_tools.tokenizer_files import copy_tokenizer
from megatron_sps2.config import DTYPES, DType
from megatron_sps2.model.manifest import MANIFEST_NAME, read_manifest
from megatron_sps2.model.weights import EMBEDDING, OUTPUT, POSITIONS, WeightRule, hf_shapes, weight_rules

SHARD_FILES = ("model_optim_rng.pt", "model_rng.pt")
# Which dimension is cut over tp ranks; what is not listed is the same on all of them.
CUT = {
    **dict.fromkeys((EMBEDDING, OUTPUT, "linear_qkv.weight", "linear_qkv.bias"), 0),
    **dict.fromkeys(("linear_fc1.weight", "linear_fc1.bias"), 0),
    **dict.fromkeys(("linear_proj.weight", "linear_fc2.weight"), 1),
}
# Names of the time before core, and Transformer Engine's -> ours.
_OLDER = (
    (r"^(language_model|model)\.", ""),
    (r"^encoder\.", "decoder."),
    (r"^embedding\.word_embeddings$", "embedding.word_embeddings.weight"),
    (r"\.query_key_value\.", ".linear_qkv."),
    (r"\.dense\.", ".linear_proj."),
    (r"\.dense_h_to_4h\.", ".linear_fc1."),
    (r"\.dense_4h_to_h\.", ".linear_fc2."),
    (r"\.input_norm\.", ".input_layernorm."),
    (r"\.self_attention\.linear_qkv\.layer_norm_", ".input_layernorm."),
    (r"\.post_attention_(norm|layernorm)\.", ".pre_mlp_layernorm."),
    (r"\.mlp\.linear_fc1\.layer_norm_", ".pre_mlp_layernorm."),
    (r"\.final_norm\.", ".final_layernorm."),
)


def find_legacy(folder: Path) -> Path | None:
    """The folder that holds mp_rank_*: `folder`, its newest iteration or its release. None: none does."""
    newest = newest_iteration(folder)
    if newest is not None and any(newest.glob("mp_rank_*")):
        return newest
    return folder if any(folder.glob("mp_rank_*")) else None


@dataclass(slots=True)
class _Stage:
    """One pipeline stage: the files of its tp ranks, by rank, and how many layers come before it."""

    files: list[Path]
    first_layer: int = 0
    tensors: list[dict[str, Tensor]] = field(default_factory=list)


class LegacySource:
    """The shards in one folder. They are mapped, not loaded: a weight is read when it is asked for."""

    def __init__(self, folder: Path, *, trust_pickle: bool = False) -> None:
        self.path = folder
        self._stages = [_Stage(files) for files in _shard_files(folder)]
        args, num_layers = None, 0
        for stage in self._stages:
            for path in stage.files:
                content = _load(path, trust_pickle)
                args = args or content.get("args")
                stage.tensors.append(_tensors(content, path))
            stage.first_layer = num_layers
            num_layers += _num_layers(stage.tensors[0])
        _check_grid(args, self.grid, folder)
        beside = next((each for each in (folder, folder.parent) if (each / MANIFEST_NAME).is_file()), None)
        self._beside = beside or folder
        self.model = read_manifest(beside).model if beside else model_config(args, folder)
        if num_layers != self.model.num_layers:
            raise ValueError(f"{folder} holds {num_layers} layers, its config says {self.model.num_layers}")
        self.dtype = _dtype(self._stages[0].tensors[0], folder)
        self._rules = {name: rule for rule in weight_rules(self.model) for name in rule.hf}
        self._check()

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return hf_shapes(self.model)

    def fetch(self, name: str) -> Tensor:
        rule = self._rules[name]
        parts = dict(zip(rule.hf, rule.split(self._whole(rule)), strict=True))
        return parts[name].contiguous()

    @property
    def grid(self) -> dict[str, int]:
        """How the files are cut."""
        return {"tp": len(self._stages[0].files), "pp": len(self._stages)}

    def save_tokenizer(self, folder: Path) -> None:
        copy_tokenizer(self._beside, folder)

    def _check(self) -> None:
        """Every weight there with its shape? ValueError naming file and weight."""
        for rule in weight_rules(self.model):
            stage, name = self._place(rule.megatron)
            for path, tensors in zip(stage.files, stage.tensors, strict=True):
                found = tuple(tensors[name].shape) if name in tensors else None
                expected = _shard_shape(rule, len(stage.files), found)
                if found is None:
                    raise ValueError(f"{path}: {name} {expected} is missing")
                if found != expected:
                    raise ValueError(f"{path}: {name} has shape {found}, expected {expected}")
        self._check_nothing_is_left()

    def _check_nothing_is_left(self) -> None:
        """Weights that the model lacks would be left out in silence. ValueError naming the first."""
        places = [self._place(rule.megatron) for rule in weight_rules(self.model)]
        for stage in self._stages:
            known = {name for where, name in places if where is stage}
            known |= {OUTPUT} if self.model.tie_embeddings else set()  # the last stage's own copy
            for path, tensors in zip(stage.files, stage.tensors, strict=True):
                left = [name for name in sorted(tensors.keys() - known) if not name.endswith("inv_freq")]
                if left:
                    raise ValueError(f"{path} holds {left[0]}, which a model of this shape lacks")

    def _place(self, name: str) -> tuple[_Stage, str]:
        """Of a weight by its name in the whole model: its stage, and what it is called there."""
        layer = re.match(r"decoder\.layers\.(\d+)\.", name)
        if layer is None:
            return self._stages[0 if name in (EMBEDDING, POSITIONS) else -1], name
        number = int(layer[1])
        stage = next(each for each in reversed(self._stages) if each.first_layer <= number)
        return stage, name.replace(f".{number}.", f".{number - stage.first_layer}.", 1)

    def _whole(self, rule: WeightRule) -> Tensor:
        stage, name = self._place(rule.megatron)
        whole = merge_tp(rule.megatron, [tensors[name] for tensors in stage.tensors], self.model.gated)
        return whole[: rule.shape[0]]  # without the padding of a vocabulary


def _shard_shape(rule: WeightRule, tp_size: int, found: tuple[int, ...] | None) -> tuple[int, ...]:
    """A vocabulary may be padded by any number of rows: those that are `found` will do if they are enough."""
    shape, cut = list(rule.shape), cut_dim(rule.megatron)
    if cut is not None:
        shape[cut] = -(-shape[cut] // tp_size)
    if found and rule.megatron in (EMBEDDING, OUTPUT):
        shape[0] = max(shape[0], found[0])
    return tuple(shape)


def cut_dim(name: str) -> int | None:
    """The dimension of a Megatron weight that tp ranks share out."""
    return next((dim for end, dim in CUT.items() if name.endswith(end)), None)


def merge_tp(name: str, shards: list[Tensor], gated: bool) -> Tensor:
    """The whole weight of its tp ranks' shards."""
    dim = cut_dim(name)
    if dim is None or len(shards) == 1:
        return shards[0]
    if gated and name.endswith("linear_fc1.weight"):  # each rank has its part of gate, then of up
        gates, ups = zip(*(shard.chunk(2) for shard in shards), strict=True)
        return torch.cat([*gates, *ups])
    return torch.cat(shards, dim=dim)


def split_tp(name: str, whole: Tensor, tp_size: int, gated: bool) -> list[Tensor]:
    """The inverse of merge_tp; vocabularies are padded before."""
    dim = cut_dim(name)
    if dim is None or tp_size == 1:
        return [whole] * tp_size
    if gated and name.endswith("linear_fc1.weight"):
        gates, ups = (half.chunk(tp_size) for half in whole.chunk(2))
        return [torch.cat(pair) for pair in zip(gates, ups, strict=True)]
    return list(whole.chunk(tp_size, dim=dim))


def _shard_files(folder: Path) -> list[list[Path]]:
    """[pipeline stage][tp rank] of the shard files. Raises naming the one that is missing."""
    found: dict[tuple[int, int], Path] = {}
    for path in folder.glob("mp_rank_*"):
        numbers = re.fullmatch(r"mp_rank_(\d+)(?:_(\d+))?", path.name)
        if numbers is None:
            continue
        file = next((path / name for name in SHARD_FILES if (path / name).is_file()), None)
        if file is None:
            raise FileNotFoundError(f"{path} holds no {' or '.join(SHARD_FILES)}")
        found[int(numbers[2] or 0), int(numbers[1])] = file
    num_stages, tp_size = (1 + max(key[i] for key in found) for i in (0, 1))
    for stage in range(num_stages):
        for rank in range(tp_size):
            if (stage, rank) not in found:
                raise FileNotFoundError(f"{folder} holds no shard of tp rank {rank}, pipeline stage {stage}")
    return [[found[stage, rank] for rank in range(tp_size)] for stage in range(num_stages)]


def _check_grid(args: Any, found: dict[str, int], folder: Path) -> None:
    """Whole ranks may be missing: only the args know."""
    values = vars(args) if isinstance(args, argparse.Namespace) else {}
    names = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size"}
    said = {axis: int(values.get(name) or found[axis]) for axis, name in names.items()}
    if said != found:
        here, there = (f"tp {grid['tp']}, pp {grid['pp']}" for grid in (found, said))
        raise FileNotFoundError(f"{folder} holds the shards of {here}, its args say {there}; fetch it again")


def _load(path: Path, trust_pickle: bool) -> dict[str, Any]:
    """Mapped tensors and plain values. Raises ValueError naming the file."""
    content = load_pickle(path, trust_pickle=trust_pickle)
    if not isinstance(content, dict) or "model" not in content:
        raise ValueError(f"{path} holds no 'model'; it is no Megatron checkpoint")
    if content.get("checkpoint_version", 3.0) < 2:
        raise ValueError(
            f"{path}: checkpoint_version {content['checkpoint_version']} orders q, k and v otherwise; load "
            "and save it once with Megatron"
        )
    return content


def _tensors(content: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    if "model0" in content:
        raise ValueError(f"{path} was written with virtual pipeline stages; save it once without them")
    return {_our_name(name): value for name, value in _flat(content["model"]) if isinstance(value, Tensor)}


def _flat(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _our_name(name: str) -> str:
    for pattern, ours in _OLDER:
        name = re.sub(pattern, ours, name)
    return name


def _num_layers(tensors: Mapping[str, Tensor]) -> int:
    layers = (re.match(r"decoder\.layers\.(\d+)\.", name) for name in tensors)
    return 1 + max((int(layer[1]) for layer in layers if layer), default=-1)


def _dtype(tensors: Mapping[str, Tensor], path: Path) -> DType:
    names = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
    for known in DTYPES:
        if names == {known}:
            return known  # type: ignore[return-value]
    raise ValueError(
        f"{path} holds weights of {', '.join(sorted(names))}; one of {', '.join(DTYPES)} is read"
    )
