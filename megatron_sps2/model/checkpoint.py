"""Megatron torch_dist checkpoints: saved at one tp size, loaded at any.

Knows Megatron's distributed checkpointing; which ranks share the sequence does not matter here.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import megatron_sps2.model.eager  # noqa: F401  # isort: skip  # before anything of Megatron

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, ShardedTensorFactory
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import CoreAttentionBuilder
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from megatron_sps2.config import DType, ModelConfig, ParallelConfig
from megatron_sps2.model.gpt import GptForward
from megatron_sps2.model.index import INDEX, check_whole, read_index, saved_tensors
from megatron_sps2.model.manifest import (
    CONVERT_AGAIN,
    TRACKER_NAME,
    WEIGHTS_NAME,
    check_files,
    check_replaceable,
    read_manifest,
    write_manifest,
)
from megatron_sps2.model.mapped_reader import MappedLoad
from megatron_sps2.model.spec import build_gpt, padded_vocab_size
from megatron_sps2.parallel.collectives import agree, gather_objects
from megatron_sps2.parallel.groups import world_axis

Shapes = dict[str, tuple[int, ...]]

_EXTRA_STATE = "_extra_state"
# Their rows are the vocabulary, padded to a multiple of tp_size: the saved number of rows may be another.
_VOCAB_ROWS = ("embedding.word_embeddings.weight", "output_layer.weight")


def load_gpt(
    folder: str | Path,
    pg_collection: ProcessGroupCollection,
    core_attention: CoreAttentionBuilder,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> GptForward:
    """This tp rank's shard of the checkpoint, ready to run. Collective, and raises, as load_weights."""
    manifest = agree(lambda: read_manifest(folder))
    ParallelConfig(tp_size=pg_collection.tp.size()).check_model(manifest.model)
    gpt = build_gpt(manifest.model, pg_collection, core_attention, dtype, device)
    load_weights(gpt, folder, pg_collection)
    return GptForward(gpt, manifest.model)


def load_weights(gpt: GPTModel, folder: str | Path, pg_collection: ProcessGroupCollection) -> None:
    """Fills `gpt`, casting to its dtype. Collective over the world.

    Raises FileNotFoundError or ValueError on every rank alike, naming file, weight and fix, when a file is
    missing or truncated, or weights are missing, unexpected or of another shape: no rank is left waiting.
    """
    sharded = _sharded_state(gpt, pg_collection.cp, with_extra_state=False)
    weights = str(Path(folder) / WEIGHTS_NAME)

    def check() -> None:
        manifest = read_manifest(folder)
        check_files(folder, manifest)
        num_rows = padded_vocab_size(manifest.model.vocab_size, pg_collection.tp.size())
        _check_weights(_expected_shapes(sharded), _saved_shapes(weights), num_rows, weights)

    agree(check)
    _read_in_place(sharded)
    try:
        # Every rank reads what it needs, replicas included: nobody has to own a weight.
        state = dist_checkpointing.load(
            sharded, weights, sharded_strategy=MappedLoad(), validate_access_integrity=False
        )
    except (CheckpointException, pickle.UnpicklingError) as error:
        raise ValueError(f"checkpoint {weights} cannot be read: {_reason(error)}; {CONVERT_AGAIN}") from error
    own = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    gpt.load_state_dict(own, strict=True)


def save_model(
    gpt: GPTModel,
    folder: str | Path,
    model: ModelConfig,
    dtype: DType,
    pg_collection: ProcessGroupCollection,
    *,
    add_files: Callable[[Path], None] | None = None,
) -> None:
    """Writes a checkpoint folder whole or not at all: in a sibling folder, renamed at the end.

    Collective over the world. `add_files` puts more files (a tokenizer) into the folder, on rank 0, before
    it gets its name. An existing checkpoint or empty folder is replaced; OSError on every rank for
    anything else. Megatron's writer starts a process: call this from a module or under
    `if __name__ == "__main__"`.
    """
    target = Path(folder).resolve()
    agree(lambda: check_replaceable(target))
    partial = target.with_name(f".{target.name}.partial")
    weights = partial / WEIGHTS_NAME
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        weights.mkdir(parents=True)
    sharded = _sharded_state(gpt, pg_collection.dp_cp, with_extra_state=True)
    weights_id = content_id(gpt)
    try:
        with _cuda_stand_ins():
            dist_checkpointing.save(sharded, str(weights))
        if dist.get_rank() == 0:
            (partial / TRACKER_NAME).write_text("release\n")
            if add_files is not None:
                add_files(partial)
            write_manifest(partial, model, dtype, weights_id)
            _replace(partial, target)
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
    gather_objects(None, world_axis())  # Nobody reads before rank 0 has renamed.


def content_id(gpt: nn.Module) -> str:
    """SHA-256 of every rank's weights: names, dtypes, shapes and bytes. Collective over the world.

    Of the tensors, not of the files: Megatron's writer puts other bytes around the same weights each time.
    """
    mine = hashlib.sha256()
    for name, weight in sorted(gpt.named_parameters()):
        mine.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        mine.update(weight.detach().contiguous().view(torch.uint8).cpu().numpy().data)
    shards = gather_objects(mine.hexdigest(), world_axis())
    return shards[0] if len(shards) == 1 else hashlib.sha256(" ".join(shards).encode()).hexdigest()


def _replace(partial: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    os.replace(partial, target)


def _sharded_state(gpt: GPTModel, replicas: dist.ProcessGroup, with_extra_state: bool) -> ShardedStateDict:
    state = gpt.sharded_state_dict(metadata={"dp_cp_group": replicas})
    if with_extra_state:
        return state
    return {name: value for name, value in state.items() if not name.endswith(_EXTRA_STATE)}


def _reason(error: BaseException) -> str:
    """The first rank's trouble in a line; torch's own text has every rank's traceback."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (inner, _) = min(error.failures.items(), key=lambda item: item[0])
        return f"rank {rank}: {inner}"
    return str(error).split("\n")[0]


def _read_in_place(sharded: ShardedStateDict) -> None:
    """Halves of a weight (gate and up) are read straight into it; Megatron would join them in a copy."""

    def join(whole: Tensor, join_copies: Callable[[list[Tensor]], Tensor], halves: list[Tensor]) -> Tensor:
        storages = {each.untyped_storage().data_ptr() for each in halves}
        return whole if storages == {whole.untyped_storage().data_ptr()} else join_copies(halves)

    for value in nested_values(sharded):
        if isinstance(value, ShardedTensorFactory):
            value.merge_fn = functools.partial(join, value.data, value.merge_fn)


def _saved_shapes(weights: str) -> Shapes:
    """Megatron would unpickle the index, and run what is in it: it is looked at before."""
    try:
        saved = saved_tensors(read_index(Path(weights) / INDEX))
        for name, tensor in saved.items():
            check_whole(name, tensor)
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {weights} cannot be read: {error}; {CONVERT_AGAIN}") from error
    return {name: tuple(tensor.size) for name, tensor in saved.items()}


def _expected_shapes(sharded: ShardedStateDict) -> Shapes:
    built = [v.build() if isinstance(v, ShardedTensorFactory) else v for v in nested_values(sharded)]
    tensors = [value for value in nested_values(built) if isinstance(value, ShardedTensor)]
    return {tensor.key: tuple(tensor.global_shape) for tensor in tensors}


def _check_weights(wanted: Shapes, saved: Shapes, num_vocab_rows: int, weights: str) -> None:
    """Raises ValueError naming the weights that are missing, unexpected or of another shape."""
    complaints = [f"missing {name} {shape}" for name, shape in wanted.items() if name not in saved]
    complaints += [f"unexpected {name} {shape}" for name, shape in saved.items() if name not in wanted]
    for name in wanted.keys() & saved.keys():
        found = (num_vocab_rows, *saved[name][1:]) if name in _VOCAB_ROWS else saved[name]
        if wanted[name] != found:
            complaints.append(f"{name} has shape {saved[name]}, expected {wanted[name]}")
    if complaints:
        shown = "; ".join(sorted(complaints)[:8]) + ("; ..." if len(complaints) > 8 else "")
        raise ValueError(
            f"the weights in {weights} do not fit the model in sps2_model.json: {shown}; {CONVERT_AGAIN}"
        )


@contextmanager
def _cuda_stand_ins() -> Iterator[None]:
    """Megatron's writer calls torch.cuda.synchronize and current_device where there is no CUDA, too."""
    if torch.cuda.is_available():
        yield
        return
    with (
        mock.patch.object(torch.cuda, "synchronize", lambda device=None: None),
        mock.patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")),
    ):
        yield
