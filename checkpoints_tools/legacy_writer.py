"""Writes release/mp_rank_TT[_PPP]/model_optim_rng.pt under core's names, shard by shard."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoints_tools.legacy import split_tp
from checkpoints_tools.legacy_args import make_args
from checkpoints_tools.mapped import on_disk
from checkpoints_tools.source import Source
from checkpoints_tools.target import Progress, whole_folder
from megatron_sps2.config import DType, ModelConfig, ParallelConfig, divisors
from megatron_sps2.model.manifest import TRACKER_NAME, WEIGHTS_NAME, write_manifest
from megatron_sps2.model.spec import padded_vocab_size
from megatron_sps2.model.weights import EMBEDDING, OUTPUT, POSITIONS, to_megatron, weight_rules

# A checkpoint's version since which q, k and v of a head lie side by side.
CHECKPOINT_VERSION = 3.0


def write_legacy(
    source: Source, target: Path, dtype: DType, tp_size: int, pp_size: int, progress: Progress
) -> None:
    """The folder `target`, whole or not at all. One pipeline stage at a time passes through the disk.

    Raises ValueError where tp_size does not divide the heads or pp_size the layers.
    """
    model = source.model
    ParallelConfig(tp_size=tp_size).check_model(model)
    if pp_size < 1 or model.num_layers % pp_size:
        fits = ", ".join(map(str, divisors(model.num_layers)))
        raise ValueError(f"pp={pp_size} does not divide the {model.num_layers} layers; use --pp {fits}")
    padded = padded_vocab_size(model.vocab_size, tp_size)
    count = sum(1 for _ in weight_rules(model))
    done = 0
    with whole_folder(target) as folder, tempfile.TemporaryDirectory(dir=folder.parent) as name_of_scratch:
        scratch = Path(name_of_scratch)
        for stage in range(pp_size):
            shards: list[dict[str, Tensor]] = [{} for _ in range(tp_size)]
            for name, here in _names_of(model, stage, pp_size):
                ((_, whole),) = to_megatron(model, source.fetch, only=name)
                if name in (EMBEDDING, OUTPUT):
                    whole = F.pad(whole, (0, 0, 0, padded - len(whole)))
                kind = getattr(torch, dtype)
                for shard, part in zip(shards, split_tp(name, whole, tp_size, model.gated), strict=True):
                    shard[here] = on_disk(part.to(kind), scratch)
                done += 1
                progress("weights", min(done, count), count)
            for rank, shard in enumerate(shards):
                name = f"mp_rank_{rank:02}" + (f"_{stage:03}" if pp_size > 1 else "")
                path = folder / WEIGHTS_NAME / name / "model_optim_rng.pt"
                path.parent.mkdir(parents=True)
                args = make_args(model, dtype, tp_size, pp_size, padded)
                content = {
                    "args": args,
                    "checkpoint_version": CHECKPOINT_VERSION,
                    "iteration": 0,
                    "model": shard,
                }
                torch.save(content, path)
        (folder / TRACKER_NAME).write_text("release\n")
        source.save_tokenizer(folder)
        write_manifest(folder, model, dtype, "")


def _names_of(model: ModelConfig, stage: int, pp_size: int) -> list[tuple[str, str]]:
    """Of one pipeline stage's weights the name in the whole model, and the name in the stage."""
    per_stage = model.num_layers // pp_size
    found = []
    for rule in weight_rules(model):
        parts = rule.megatron.split(".")
        if parts[1] == "layers":
            layer = int(parts[2])
            if layer // per_stage == stage:
                found.append((rule.megatron, ".".join((*parts[:2], str(layer % per_stage), *parts[3:]))))
        elif stage == (0 if rule.megatron in (EMBEDDING, POSITIONS) else pp_size - 1):
            found.append((rule.megatron, rule.megatron))
    if model.tie_embeddings and pp_size > 1 and stage == pp_size - 1:
        found.append((EMBEDDING, OUTPUT))  # the last stage's own copy
    return found
