"""Megatron core checkpoints (torch_dist), read and written weight by weight in one process.

Knows how the model floor saves; a checkpoint larger than memory passes through the disk.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import megatron_sps2.model.eager  # noqa: F401  # isort: skip  # before anything of Megatron

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from checkpoints_tools.core_reader import CoreReader
from checkpoints_tools.legacy_args import model_config
from checkpoints_tools.mapped import on_disk
from checkpoints_tools.pickles import load_pickle
from checkpoints_tools.source import Source
from checkpoints_tools.target import Progress
from checkpoints_tools.tokenizer_files import copy_tokenizer
from megatron_sps2.config import DTYPES, DType
from megatron_sps2.model.checkpoint import save_model
from megatron_sps2.model.index import INDEX
from megatron_sps2.model.manifest import (
    MANIFEST_NAME,
    TRACKER_NAME,
    WEIGHTS_NAME,
    check_files,
    read_manifest,
)
from megatron_sps2.model.spec import build_gpt
from megatron_sps2.model.weights import EMBEDDING, OUTPUT, hf_shapes, to_megatron, weight_rules

# Beside the index: what is not a tensor, Megatron's args among it.
COMMON = "common.pt"


class CoreSource:
    """A torch_dist checkpoint, of sps2 or of Megatron's training. No weight is read before `fetch`."""

    def __init__(self, folder: Path, *, trust_pickle: bool = False) -> None:
        self.path = folder
        if (folder / MANIFEST_NAME).is_file():
            manifest = read_manifest(folder)
            check_files(folder, manifest)
            self.model, self.dtype = manifest.model, manifest.dtype
            self._reader = CoreReader(folder / WEIGHTS_NAME)
        else:
            newest = find_core(folder)
            assert newest is not None, "the caller has looked"
            common = load_pickle(newest / COMMON, trust_pickle=trust_pickle)
            self.model = model_config(common.get("args"), newest)
            self._reader = CoreReader(newest)
            self.dtype = _dtype(self._reader, newest)
        self._rules = {name: rule for rule in weight_rules(self.model) for name in rule.hf}
        self._newest: tuple[str, dict[str, Tensor]] = "", {}
        self._check_names()

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return hf_shapes(self.model)

    def fetch(self, name: str) -> Tensor:
        """q, k and v, and gate and up, are one weight here, which is kept for the others' turn."""
        rule = self._rules[name]
        if self._newest[0] != rule.megatron:
            whole = self._reader.read(rule.megatron)
            if rule.megatron in (EMBEDDING, OUTPUT):
                whole = whole[: rule.shape[0]]  # without its padding
            if tuple(whole.shape) != rule.shape:
                found = tuple(whole.shape)
                raise ValueError(
                    f"{self._reader.path}: {rule.megatron} has shape {found}, expected {rule.shape}"
                )
            parts = rule.split(whole)
            self._newest = rule.megatron, dict(zip(rule.hf, parts, strict=True))
        return self._newest[1][name].contiguous()

    def _check_names(self) -> None:
        """Weights that the model lacks would be left out in silence. ValueError naming the first."""
        known = {self._reader.key(rule.megatron) for rule in weight_rules(self.model)}
        for name in sorted(self._reader.shapes.keys() - known):
            if name.startswith(("decoder.", "embedding.", "output_layer.")) and "_extra_state" not in name:
                raise ValueError(
                    f"{self._reader.path} holds {name}, which a model of this shape does not have"
                )

    def save_tokenizer(self, folder: Path) -> None:
        copy_tokenizer(self.path, folder)


def find_core(folder: Path) -> Path | None:
    """The folder with the index: `folder`, or the iteration that it calls its latest. None: there is none."""
    named = newest_iteration(folder)
    found = (each for each in (named, folder) if each is not None)
    return next((each for each in found if (each / INDEX).is_file() and (each / COMMON).is_file()), None)


def newest_iteration(folder: Path) -> Path | None:
    """What Megatron's tracker file names; None where there is none."""
    tracker = folder / TRACKER_NAME
    if not tracker.is_file():
        return None
    newest = tracker.read_text().strip()
    if newest != "release" and not newest.isdigit():
        return None
    return folder / (newest if newest == "release" else f"iter_{int(newest):07}")


def _dtype(reader: CoreReader, path: Path) -> DType:
    found = str(reader.dtype(EMBEDDING)).removeprefix("torch.")
    if found not in DTYPES:
        raise ValueError(f"{path} holds weights of {found}; one of {', '.join(DTYPES)} is read")
    return cast(DType, found)


def write_core(
    source: Source, target: Path, dtype: DType, pg_collection: ProcessGroupCollection, progress: Progress
) -> None:
    """The checkpoint folder `target`, whole or not at all."""
    with tempfile.TemporaryDirectory(dir=target.resolve().parent, prefix=".sps2-") as scratch:
        gpt = build_gpt(source.model, pg_collection, _NoAttention, getattr(torch, dtype))
        params, kind = dict(gpt.named_parameters()), getattr(torch, dtype)
        for done, (name, weight) in enumerate(to_megatron(source.model, source.fetch), start=1):
            params.pop(name).data = on_disk(weight.to(kind), Path(scratch))
            progress("weights", done, done + len(params))
        assert not params, f"no rule fills {sorted(params)}"
        save_model(gpt, target, source.model, dtype, pg_collection, add_files=source.save_tokenizer)


class _NoAttention(nn.Module):
    """Stands in the core attention slot of a model that is only filled and saved."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__()


@contextmanager
def alone() -> Iterator[ProcessGroupCollection]:
    """Process groups of one rank, without a launcher or a port; a world of one rank is used as it is."""
    if dist.is_initialized():
        if dist.get_world_size() > 1:
            raise RuntimeError(
                f"convert runs on one rank, the world has {dist.get_world_size()}; run it alone"
            )
        yield _groups()
        return
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield _groups()
        finally:
            dist.destroy_process_group()


def _groups() -> ProcessGroupCollection:
    names = ("tp", "cp", "pp", "dp_cp", "tp_cp", "tp_dp_cp", "ep", "expt_tp", "expt_dp")
    return ProcessGroupCollection(**dict.fromkeys(names, dist.group.WORLD), embd=None)
