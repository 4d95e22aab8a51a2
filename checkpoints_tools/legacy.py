"""The shards of Megatron's older checkpoints, tp and pp merged.

Knows core's names, Transformer Engine's and those before core (language_model.encoder); no file: those are
legacy_files.py's and deepspeed.py's, and writing is legacy_writer.py's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.legacy_args import model_config
from checkpoints_tools.tokenizer_files import copy_tokenizer
from megatron_sps2.config import DTYPES, DType
from megatron_sps2.model.manifest import MANIFEST_NAME, read_manifest
from megatron_sps2.model.weights import EMBEDDING, OUTPUT, POSITIONS, WeightRule, hf_shapes, weight_rules

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
    (r"^word_embeddings_for_head\.", "output_layer."),  # a copy, on the last stage of tied embeddings
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


@dataclass(slots=True)
class Stage:
    """One pipeline stage: of each tp rank its file and its weights under our names, layers counted from 0."""

    files: list[Path]
    tensors: list[dict[str, Tensor]]
    first_layer: int = 0


@dataclass(frozen=True, slots=True)
class Shards:
    """What the files of a folder hold. args: Megatron's, or None."""

    format: str
    folder: Path
    args: Any
    stages: list[Stage]


class LegacySource:
    """The model that shards make up. They are mapped, not loaded: a weight is read when it is asked for."""

    def __init__(self, shards: Shards) -> None:
        """Raises ValueError naming args that are not supported, or the file and weight that do not fit."""
        self.path = folder = shards.folder
        self.format = shards.format
        self._stages, num_layers = shards.stages, 0
        for stage in self._stages:
            stage.first_layer = num_layers
            num_layers += _num_layers(stage.tensors[0])
        beside = next((each for each in (folder, folder.parent) if (each / MANIFEST_NAME).is_file()), None)
        self._beside = beside or folder
        self.model = read_manifest(beside).model if beside else model_config(shards.args, folder)
        if num_layers != self.model.num_layers:
            raise ValueError(f"{folder} holds {num_layers} layers, its config says {self.model.num_layers}")
        self.dtype = _dtype(self._stages[0].tensors[0], folder)
        self._rules = {name: rule for rule in weight_rules(self.model) for name in rule.hf}
        self._newest: tuple[str, dict[str, Tensor]] = ("", {})
        self._check()

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return hf_shapes(self.model)

    def fetch(self, name: str) -> Tensor:
        """q, k and v, and gate and up, are one weight here, which is kept for the others' turn."""
        rule = self._rules[name]
        if self._newest[0] != rule.megatron:
            self._newest = rule.megatron, dict(zip(rule.hf, rule.split(self._whole(rule)), strict=True))
        return self._newest[1][name].contiguous()

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

    def _place(self, name: str) -> tuple[Stage, str]:
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


def our_names(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a state dict, nested or flat, by whatever version of Megatron, under our names."""
    weights = {_our_name(name): value for name, value in _flat(content) if isinstance(value, Tensor)}
    return {name: each for name, each in weights.items() if not name.endswith("_extra_state")}


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
