"""SRC, of any format that is read -> DST: a Megatron checkpoint, core or legacy, or a Hugging Face folder.

One process, no launcher, CPU only. Knows the steps; each format has a file of its own.
"""

from __future__ import annotations

from pathlib import Path

from checkpoints_tools.core import CoreSource, alone, find_core, write_core
from checkpoints_tools.deepspeed import deepspeed_shards, find_deepspeed
from checkpoints_tools.gguf import GgufSource
from checkpoints_tools.hf import HfSource
from checkpoints_tools.hf_writer import write_hf
from checkpoints_tools.legacy import LegacySource
from checkpoints_tools.legacy_files import find_legacy, legacy_shards
from checkpoints_tools.legacy_writer import write_legacy
from checkpoints_tools.llama2c import Llama2cSource, is_llama2c
from checkpoints_tools.source import CheckedSource, Source, check_weights
from checkpoints_tools.target import Progress, check_source, check_target
from megatron_sps2.config import CHECKPOINT_FORMATS, DTYPES, CheckpointFormat, DType, ModelConfig
from megatron_sps2.model.heap import return_freed_memory
from megatron_sps2.model.manifest import MANIFEST_NAME


def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: CheckpointFormat = "megatron",
    tp_size: int = 1,
    pp_size: int = 1,
    dtype: DType | None = None,
    force: bool = False,
    trust_pickle: bool = False,
    progress: Progress | None = None,
) -> ModelConfig:
    """Writes the folder `dst`, whole or not at all, and returns the model's shape.

    tp_size, pp_size: shards of a megatron-legacy checkpoint; the others load at any. dtype: of the weights on
    disk; default is the source's (GGUF: float32). force: replace a checkpoint that is at `dst`; anything else
    there but an empty folder is left alone. trust_pickle: let a legacy checkpoint run the code it holds.
    Raises FileNotFoundError, FileExistsError or ValueError naming the file, the weight or the config entry.
    Megatron's writer starts a process: call this under `if __name__ == "__main__"` or from a module.
    """
    target = Path(dst)
    check_target(Path(src), target, force)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not known; use one of {', '.join(DTYPES)}")
    if to not in CHECKPOINT_FORMATS:
        raise ValueError(f"to={to!r} is not known; use one of {', '.join(CHECKPOINT_FORMATS)}")
    return_freed_memory()
    source = CheckedSource(open_source(Path(src), trust_pickle=trust_pickle))
    check_weights(source)
    target.resolve().parent.mkdir(parents=True, exist_ok=True)
    chosen, show = dtype or source.dtype, progress or _silent
    if to == "megatron":
        with alone() as pg_collection:
            write_core(source, target, chosen, pg_collection, show)
    elif to == "hf":
        write_hf(source, target, chosen, show)
    else:
        write_legacy(source, target, chosen, tp_size, pp_size, show)
    return source.model


def reshard(
    src: str | Path,
    dst: str | Path,
    *,
    tp_size: int = 1,
    pp_size: int = 1,
    force: bool = False,
    trust_pickle: bool = False,
    progress: Progress | None = None,
) -> ModelConfig:
    """A Megatron checkpoint of any cut -> a megatron-legacy one cut for tp_size and pp_size, dtype kept.

    A core checkpoint needs none of this: it loads at any. Raises as `convert` does.
    """
    return convert(
        src,
        dst,
        to="megatron-legacy",
        tp_size=tp_size,
        pp_size=pp_size,
        force=force,
        trust_pickle=trust_pickle,
        progress=progress,
    )


def open_source(src: Path, *, trust_pickle: bool = False) -> Source:
    """Guesses the format of `src` by what is there."""
    check_source(src)
    if src.is_file() and src.suffix.lower() == ".gguf":
        return GgufSource(src)
    if src.is_file() and is_llama2c(src):
        return Llama2cSource(src)
    if src.is_dir() and (found := find_legacy(src)) is not None:
        return LegacySource(legacy_shards(found, trust_pickle=trust_pickle))
    if src.is_dir() and (found := find_deepspeed(src)) is not None:
        return LegacySource(deepspeed_shards(found, trust_pickle=trust_pickle))
    if src.is_dir() and ((src / MANIFEST_NAME).is_file() or find_core(src) is not None):
        return CoreSource(src, trust_pickle=trust_pickle)
    if (src / "config.json").is_file():
        return HfSource(src, trust_pickle=trust_pickle)
    raise ValueError(
        f"{src} is no .gguf or llama2.c file, no folder with config.json, and no Megatron checkpoint "
        "(release/ or iter_NNNNNNN/, with .metadata and common.pt, or with mp_rank_TT/model_optim_rng.pt; or "
        "DeepSpeed's, with mp_rank_TT_model_states.pt)"
    )


def _silent(what: str, done: int, total: int) -> None:
    pass
