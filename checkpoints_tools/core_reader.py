"""Weights of a torch_dist folder one at a time, by the model floor's names; no process group is needed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_sps2.model.index import check_whole, saved_tensors
from megatron_sps2.model.mapped_reader import MappedReader

# Megatron saves the norms before a linear under the linear's name, as Transformer Engine fuses them.
_SAVED_AS = (
    (".input_layernorm.", ".self_attention.linear_qkv.layer_norm_"),
    (".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_"),
)


class CoreReader:
    """The tensors in one folder of *.distcp files. Raises ValueError naming the folder and the weight."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self._reader = MappedReader(folder)
        self._metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By the names in the files, in which all layers are one tensor, and all experts."""
        return {name: tuple(each.size) for name, each in saved_tensors(self._metadata).items()}

    def dtype(self, name: str) -> torch.dtype:
        """As saved."""
        return self._find(name)[1].properties.dtype

    def key(self, name: str) -> str:
        """What the files call a weight of the model. Raises ValueError where they have none."""
        return self._find(name)[0]

    def read(self, name: str) -> Tensor:
        """A weight by its name in the model, "decoder.layers.3..."."""
        key, found, place = self._find(name)
        try:
            check_whole(key, found)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from error
        offsets = [*place, *[0] * (len(found.size) - len(place))]
        sizes = [*[1] * len(place), *found.size[len(place) :]]
        chunk = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
        whole = torch.empty(sizes, dtype=found.properties.dtype)
        plan = LoadPlan(create_read_items_for_chunk_list(key, found, [chunk]))
        try:
            self._reader.read_data(plan, _Into(whole)).wait()
        except Exception as error:  # A damaged file can raise anything.
            raise ValueError(f"{self.path}: {name} cannot be read: {error!r}") from error
        return whole[(0,) * len(place)]

    def _find(self, name: str) -> tuple[str, TensorStorageMetadata, tuple[int, ...]]:
        """The key in the files, what is known of it, and where `name` lies in its first dimensions."""
        tensors = saved_tensors(self._metadata)
        for ours, saved in _SAVED_AS:
            name = name.replace(ours, saved)
        for key, place in _keys(name):
            if key not in tensors:
                continue
            for index, size, what in zip(place, tensors[key].size, ("layer", "expert"), strict=False):
                if index >= size:
                    raise ValueError(f"{self.path} holds {size} {what}s of {key}, not {what} {index}")
            return key, tensors[key], place
        raise ValueError(f"{self.path} holds no {name}")


def _keys(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """What a weight may be called: by itself, or in one tensor of all layers, and in it of all experts."""
    yield name, ()
    layer = re.match(r"decoder\.layers\.(\d+)\.", name)
    if layer is None:
        return
    key = name.replace(f".{layer[1]}.", ".", 1)
    yield key, (int(layer[1]),)
    expert = re.search(r"\.local_experts\.(\d+)\.", key)
    if expert is not None:
        yield key.replace(expert[0], ".experts."), (int(layer[1]), int(expert[1]))


class _Into(LoadPlanner):
    """Puts everything that is read into one tensor."""

    def __init__(self, target: Tensor) -> None:
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        view = self._target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(dim, start, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """It was copied into the target already."""

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None: ...
    def create_local_plan(self) -> LoadPlan: ...  # type: ignore[empty-body]
    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]: ...  # type: ignore[empty-body]
    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan: ...  # type: ignore[empty-body]
    def load_bytes(self, read_item: ReadItem, value: Any) -> None: ...
