"""SRC (a GGUF file or a Hugging Face folder) -> a Megatron checkpoint folder with tokenizer and model config.

One process, no launcher, CPU only. Knows the steps; the formats are in hf.py and gguf.py.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from checkpoints_tools.gguf import GgufSource
from checkpoints_tools.hf import HfSource
from checkpoints_tools.source import Source, check_weights
from megatron_sps2.config import DTYPES, DType, ModelConfig
from megatron_sps2.model.checkpoint import save_model
from megatron_sps2.model.manifest import check_replaceable
from megatron_sps2.model.spec import build_gpt
from megatron_sps2.model.weights import to_megatron

Progress = Callable[[str, int, int], None]  # (what, done, total)


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    dtype: DType | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ModelConfig:
    """Writes the checkpoint folder `dst`, whole or not at all, and returns the model's shape.

    dtype: of the weights on disk; default is the source's (GGUF: float32). force: replace a checkpoint that
    is at `dst`; anything else there but an empty folder is left alone. Raises FileNotFoundError,
    FileExistsError or ValueError naming the file, the weight or the config entry.
    Megatron's writer starts a process: call this under `if __name__ == "__main__"` or from a module.
    """
    target = Path(dst)
    _check_target(Path(src), target, force)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; use one of {', '.join(DTYPES)}")
    source = open_source(Path(src))
    check_weights(source)
    target.resolve().parent.mkdir(parents=True, exist_ok=True)
    chosen = dtype or source.dtype
    with _alone() as pg_collection:
        gpt = build_gpt(source.model, pg_collection, _NoAttention, getattr(torch, chosen))
        _fill(gpt, source, progress or _silent)
        save_model(gpt, target, source.model, chosen, pg_collection, add_files=source.save_tokenizer)
    return source.model


def open_source(src: Path) -> Source:
    """Guesses the format of `src`: a file ending in .gguf, or a folder with config.json."""
    if not src.exists():
        raise FileNotFoundError(f"{src} does not exist; give a .gguf file or a Hugging Face model folder")
    if src.is_file() and src.suffix.lower() == ".gguf":
        return GgufSource(src)
    if (src / "config.json").is_file():
        return HfSource(src)
    raise ValueError(
        f"{src} is neither a .gguf file nor a folder with config.json; these two formats are read"
    )


def _check_target(src: Path, target: Path, force: bool) -> None:
    source, place = src.resolve(), target.resolve()
    if source == place or place in source.parents or source in place.parents:
        raise ValueError(
            f"SRC {src} and DST {target} are the same or one lies inside the other; give a DST outside SRC"
        )
    check_replaceable(target)
    if target.is_dir() and any(target.iterdir()) and not force:
        raise FileExistsError(f"{target} is not empty; give another folder, or --force to replace it")


def _fill(gpt: nn.Module, source: Source, progress: Progress) -> None:
    params = dict(gpt.named_parameters())
    for done, (name, weight) in enumerate(to_megatron(source.model, source.fetch), start=1):
        with torch.no_grad():
            params[name].copy_(weight)
        progress("weights", done, len(params))


def _silent(what: str, done: int, total: int) -> None:
    pass


class _NoAttention(nn.Module):
    """Stands in the core attention slot of a model that is only filled and saved."""

    def __init__(self, **kwargs: object) -> None:
        super().__init__()


@contextmanager
def _alone() -> Iterator[ProcessGroupCollection]:
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
    world = dist.group.WORLD
    return ProcessGroupCollection(tp=world, cp=world, pp=world, embd=None, dp_cp=world)
