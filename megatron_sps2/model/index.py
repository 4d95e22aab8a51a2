"""The index of a torch_dist checkpoint: which tensors there are, of which shapes, and where they lie.

It is a pickle: only the classes that describe tensors are allowed in it, so that nothing of it runs.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

INDEX = ".metadata"
_ALLOWED_MODULES = (
    "torch.distributed.checkpoint.metadata",
    "torch.distributed.checkpoint.planner",
    "torch.distributed.checkpoint.filesystem",
)
_ALLOWED_NAMES = {("torch", "Size"), ("torch.serialization", "_get_layout"), ("collections", "OrderedDict")}


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


class _Restricted(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not (module in _ALLOWED_MODULES or is_dtype or (module, name) in _ALLOWED_NAMES) or "." in name:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which describes no tensor")
        return super().find_class(module, name)
