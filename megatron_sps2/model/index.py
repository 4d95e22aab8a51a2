"""The index of a torch_dist checkpoint: which tensors there are, of which shapes, and where they lie.

It is a pickle: only the classes that describe tensors are allowed in it, so that nothing of it runs.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import filesystem, metadata, planner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from megatron_sps2.config import DTYPES

INDEX = ".metadata"
# What an index is made of, by the names that a pickle has for it. Names are looked up here and nowhere else:
# a module that is allowed as a whole gives what it imports, too.
_DESCRIBE: dict[tuple[str, str], Any] = {
    **{
        (each.__module__, each.__qualname__): each
        for each in (
            *(metadata.Metadata, metadata.MetadataIndex, metadata.StorageMeta, metadata.TensorProperties),
            *(metadata.BytesStorageMetadata, metadata.TensorStorageMetadata, metadata.ChunkStorageMetadata),
            metadata._MEM_FORMAT_ENCODING,
            *(planner.SavePlan, planner.WriteItem, planner.WriteItemType, planner.TensorWriteData),
            planner.BytesIOWriteData,
            filesystem._StorageInfo,
            torch.serialization._get_layout,
        )
    },
    ("torch", "Size"): torch.Size,
    ("collections", "OrderedDict"): OrderedDict,
    **{("torch", name): each for name, each in vars(torch).items() if isinstance(each, torch.dtype)},
}


def read_index(path: Path) -> Metadata:
    """Raises FileNotFoundError or ValueError naming the file; nothing in it was run."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; a Megatron core checkpoint has one")
    try:
        with path.open("rb") as file:
            found = _Restricted(file).load()
    except Exception as error:  # A damaged pickle can raise anything.
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, Metadata):
        raise ValueError(f"{path} holds a {type(found).__name__}, no index of tensors")
    outside = [each.relative_path for each in found.storage_data.values() if "/" in each.relative_path]
    if outside:
        raise ValueError(f"{path} points outside its folder, to {outside[0]!r}; it is not read")
    return found


def saved_tensors(index: Metadata) -> dict[str, TensorStorageMetadata]:
    """By the names in the files."""
    found = index.state_dict_metadata
    return {name: each for name, each in found.items() if isinstance(each, TensorStorageMetadata)}


def check_whole(name: str, tensor: TensorStorageMetadata) -> None:
    """Raises ValueError for a tensor of a kind that is not served, or of which a part is not stored."""
    if (kind := str(tensor.properties.dtype).removeprefix("torch.")) not in DTYPES:
        raise ValueError(f"{name} is of dtype {kind}; only {', '.join(DTYPES)} are read")
    stored = sum(chunk.sizes.numel() for chunk in tensor.chunks)
    if stored != tensor.size.numel():  # what is not stored would be whatever the memory held
        raise ValueError(f"of the {tensor.size.numel()} values of {name} the files hold {stored}")


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _DESCRIBE:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which describes no tensor")
        return _DESCRIBE[module, name]
