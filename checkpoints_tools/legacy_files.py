"""The files of Megatron's older checkpoints: iter_NNNNNNN/mp_rank_TT[_PPP]/model_optim_rng.pt.

A file is a pickle: it is read without running any code unless the user says otherwise.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from checkpoints_tools.core import newest_iteration
from checkpoints_tools.legacy import Shards, Stage, our_names
from checkpoints_tools.pickles import load_pickle

FORMAT = "megatron-legacy"
SHARD_FILES = ("model_optim_rng.pt", "model_rng.pt")


def find_legacy(folder: Path) -> Path | None:
    """The folder that holds mp_rank_*: `folder`, its newest iteration or its release. None: none does."""
    found = (each for each in (newest_iteration(folder), folder) if each is not None)
    return next((each for each in found if any(path.is_dir() for path in each.glob("mp_rank_*"))), None)


def legacy_shards(folder: Path, *, trust_pickle: bool = False) -> Shards:
    """Mapped, not loaded. Raises FileNotFoundError or ValueError naming the file."""
    args, stages = None, []
    for files in _shard_files(folder):
        tensors = []
        for path in files:
            content = load_shard(path, "model", trust_pickle)
            args = args or content.get("args")
            tensors.append(our_names(content["model"]))
        stages.append(Stage(files, tensors))
    check_grid(args, {"tp": len(stages[0].files), "pp": len(stages)}, folder)
    return Shards(FORMAT, folder, args, stages)


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


def check_grid(args: Any, found: dict[str, int], folder: Path) -> None:
    """`found`: how the files are cut. Whole ranks may be missing: only the args know."""
    values = vars(args) if isinstance(args, argparse.Namespace) else {}
    names = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size"}
    said = {axis: int(values.get(names[axis]) or size) for axis, size in found.items()}
    if said != found:
        here, there = (", ".join(f"{axis} {size}" for axis, size in grid.items()) for grid in (found, said))
        raise FileNotFoundError(f"{folder} holds the shards of {here}, its args say {there}; fetch it again")


def load_shard(path: Path, holds: str, trust_pickle: bool) -> dict[str, Any]:
    """Mapped tensors and plain values. Raises ValueError naming the file."""
    content = load_pickle(path, trust_pickle=trust_pickle)
    if isinstance(content, dict) and f"{holds}0" in content:
        raise ValueError(f"{path} was written with virtual pipeline stages; save it once without them")
    if not isinstance(content, dict) or holds not in content:
        raise ValueError(f"{path} holds no {holds!r}; it is no Megatron checkpoint")
    if content.get("checkpoint_version", 3.0) < 2:
        raise ValueError(
            f"{path}: checkpoint_version {content['checkpoint_version']} orders q, k and v otherwise; load "
            "and save it once with Megatron"
        )
    return content
