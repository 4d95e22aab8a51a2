"""Reads torch_dist files by mapping them: of a tensor only the part that is asked for comes off the disk.

torch's own reader loads every stored tensor whole, on every rank, whichever part of it the rank needs.
"""

from __future__ import annotations

import io
import mmap
import zipfile
from pathlib import Path
from typing import Any
from unittest import mock

import megatron_sps2.model.eager  # noqa: F401  # isort: skip  # before anything of Megatron

import numpy as np
import torch
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, StateDict
from megatron.core.dist_checkpointing.strategies import torch as megatron_strategy
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem
from torch.futures import Future

from megatron_sps2.model.index import INDEX, read_index

# A tensor is saved as an archive of its own, with one record for its elements.
_ELEMENTS = "data/0"
# An archive ends with its directory; one of a single tensor's is a few hundred bytes.
_DIRECTORY_BYTES = 1 << 16


class MappedReader(FileSystemReader):
    """torch's reader of *.distcp files, but for tensors that lie in them as they are: those are mapped."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self._index: Metadata | None = None

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises as `read_index`: nothing in the index is run."""
        if self._index is None:
            self._index = read_index(Path(self.path) / INDEX)
            self._index.storage_meta = StorageMeta(load_id=self.load_id)
        return self._index

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        left = [item for item in plan.items if not self._read_mapped(item, planner)]
        return super().read_data(LoadPlan(left), planner)

    def _read_mapped(self, item: ReadItem, planner: LoadPlanner) -> bool:
        """False, and nothing done, for what is not a tensor that lies in the file in order."""
        stored = self.storage_data[item.storage_index]
        if item.type != LoadItemType.TENSOR or stored.transform_descriptors:
            return False
        path = Path(self.path) / stored.relative_path
        with path.open("rb") as file:
            archive = self._slice_file(file, stored)
            with torch.serialization.skip_data():  # shape and dtype; the memory is never touched
                shape = torch.load(archive, map_location="cpu", weights_only=True)
            archive.seek(max(0, stored.length - _DIRECTORY_BYTES))
            if not _lies_in_order(shape, archive.read()):
                return False
            archive.seek(0)
            reader: Any = torch._C.PyTorchFileReader(archive)
            start = stored.offset + reader.get_record_offset(_ELEMENTS)
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                part = self._copy(mapped, start, shape, item)
        target = planner.resolve_tensor(item).detach()
        if part.shape != target.shape:
            raise ValueError(
                f"{path} holds {tuple(part.shape)} of {item.storage_index.fqn}, not {tuple(target.shape)}"
            )
        target.copy_(part)
        planner.commit_tensor(item, target)
        return True

    def _copy(self, mapped: mmap.mmap, start: int, shape: Tensor, item: ReadItem) -> Tensor:
        """The part that `item` asks for of a tensor like `shape` whose elements begin at byte `start`."""
        bits = f"i{shape.element_size()}"  # numpy has no bfloat16
        whole = np.ndarray(shape.shape, dtype=bits, buffer=mapped, offset=start)
        pairs = zip(item.storage_offsets, item.lengths, strict=True)
        part = np.array(whole[tuple(slice(first, first + length) for first, length in pairs)], order="C")
        del whole  # so that the map can be closed
        return torch.from_numpy(part).view(shape.dtype)


def _lies_in_order(shape: Any, directory: bytes) -> bool:
    """Whether an archive that ends with `directory` holds all elements of one tensor, not packed."""
    if not isinstance(shape, Tensor) or not shape.is_contiguous() or shape.storage_offset():
        return False
    with zipfile.ZipFile(io.BytesIO(directory)) as members:
        elements = [each for each in members.infolist() if each.filename.endswith(f"/{_ELEMENTS}")]
    return [(e.compress_type, e.file_size) for e in elements] == [(zipfile.ZIP_STORED, shape.nbytes)]


class MappedLoad(megatron_strategy.TorchDistLoadShardedStrategy):
    """Megatron's way of loading, with the reader above."""

    def load(self, sharded_state_dict: ShardedStateDict, checkpoint_dir: Path) -> StateDict:
        def mapped(folder: str | Path, cache_metadata: bool = False) -> MappedReader:
            return MappedReader(folder)

        # Megatron takes no reader as an argument.
        with mock.patch.object(megatron_strategy, "_get_filesystem_reader", mapped):
            return super().load(sharded_state_dict, checkpoint_dir)
