"""Checkpoints of Megatron-DeepSpeed, module weights only: those of ZeRO 0 to 2, with or without pipeline, and
universal ones.

Knows DeepSpeed's file names; what the files hold are the weights of Megatron before core (legacy.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoints_tools.legacy import OUTPUT, Shards, Stage, our_names
from checkpoints_tools.legacy_files import check_grid, load_shard
from checkpoints_tools.pickles import load_pickle

FORMAT = "deepspeed"
LATEST = ("latest", "latest_universal")
_STATES = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_LAYER = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
_ZERO_3 = re.compile(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")
# What a pipeline calls its layers: by number, or where the output reuses the embedding, by this.
_NUMBERED = re.compile(r"(\d+|tied_modules\.embed)\.(.+)")

Weights = dict[str, Tensor]


def find_deepspeed(folder: Path) -> Path | None:
    """The folder of the newest step: what its file `latest` names, or `folder`. None: there is none."""
    named = (folder / (folder / each).read_text().strip() for each in LATEST if (folder / each).is_file())
    inside = (each for each in named if each.parent == folder)
    return next((each for each in (*inside, folder) if _holds_states(each)), None)


def deepspeed_shards(folder: Path, *, trust_pickle: bool = False) -> Shards:
    """Mapped, not loaded. Raises FileNotFoundError or ValueError naming the file, or what is not read."""
    if any(_ZERO_3.fullmatch(path.name) for path in folder.iterdir()):
        raise ValueError(
            f"{folder} was written by ZeRO 3, which cuts every weight over the ranks; make it universal with "
            "DeepSpeed's ds_to_universal and convert that"
        )
    states = {int(rank[1]): path for path, rank in _matching(folder, _STATES)}
    content = {rank: load_shard(path, "module", trust_pickle) for rank, path in sorted(states.items())}
    args = content[0].get("args") if 0 in content else None
    if (folder / "zero").is_dir():
        stage = _universal(folder / "zero", args, trust_pickle)
        _know_vocabulary(args, content.get(0, {}))
        return Shards(FORMAT, folder, args, [stage])
    if any(_matching(folder, _LAYER)):
        stage = _pipeline(folder, trust_pickle)
    else:
        _check_ranks(content.keys(), f"{folder} holds no mp_rank_{{:02d}}_model_states.pt")
        tensors = [our_names(content[rank]["module"] or {}) for rank in sorted(content)]
        stage = Stage([states[rank] for rank in sorted(states)], tensors)
    check_grid(args, {"tp": len(stage.files)}, folder)
    return Shards(FORMAT, folder, args, [stage])


def _holds_states(folder: Path) -> bool:
    return folder.is_dir() and any(
        pattern.fullmatch(path.name) for path in folder.iterdir() for pattern in (_STATES, _ZERO_3)
    )


def _matching(folder: Path, pattern: re.Pattern[str]) -> Iterable[tuple[Path, re.Match[str]]]:
    found = ((path, pattern.fullmatch(path.name)) for path in sorted(folder.iterdir()))
    return ((path, match) for path, match in found if match)


def _check_ranks(ranks: Iterable[int], complaint: str) -> None:
    missing = set(range(1 + max(ranks))).difference(ranks)
    if missing:
        raise FileNotFoundError(complaint.format(min(missing)))


def _pipeline(folder: Path, trust_pickle: bool) -> Stage:
    """A file for each layer and tp rank."""
    by_rank: dict[int, dict[int, Weights]] = {}
    for path, numbers in _matching(folder, _LAYER):
        content = load_pickle(path, trust_pickle=trust_pickle)
        if not isinstance(content, Mapping):
            raise ValueError(f"{path} holds a {type(content).__name__}, no weights by name")
        weights = {name: each for name, each in content.items() if isinstance(each, Tensor)}
        by_rank.setdefault(int(numbers[2]), {})[int(numbers[1])] = weights
    _check_ranks(by_rank, f"{folder} holds no layer_*-model_{{:02d}}-model_states.pt")
    for rank, layers in by_rank.items():
        missing = by_rank[0].keys() ^ layers.keys()
        if missing:
            raise FileNotFoundError(
                f"{folder} holds layer_{min(missing):02d} of some tp ranks only, not of both 0 and {rank}"
            )
    ranks = sorted(by_rank)
    files = [folder / f"layer_*-model_{rank:02d}-model_states.pt" for rank in ranks]
    return Stage(files, [our_names(_named(by_rank[rank])) for rank in ranks])


def _universal(folder: Path, args: Any, trust_pickle: bool) -> Stage:
    """zero/NAME/fp32.pt: each weight whole, merged over tp by DeepSpeed."""
    flat: Weights = {}
    by_layer: dict[int, Weights] = {}
    for path in sorted(folder.glob("*/fp32.pt")):
        content = load_pickle(path, trust_pickle=trust_pickle)
        weight = content.get("param") if isinstance(content, dict) else content
        if not isinstance(weight, Tensor):
            raise ValueError(f"{path} holds no weight")
        name = path.parent.name
        is_told = isinstance(content, dict) and content.get("param_n_sub_params") == 2
        if "dense_h_to_4h" in name and _halves_are_cut(args) and not is_told:
            raise ValueError(
                f"{path} was merged from several tp ranks without telling gate and up apart, so their rows "
                "are mixed; make it universal again with a newer Megatron-DeepSpeed"
            )
        numbered = _NUMBERED.fullmatch(name)
        if numbered is None:
            flat[name.removeprefix("module.")] = weight
        else:
            number = int(numbered[1]) if numbered[1].isdigit() else -1
            by_layer.setdefault(number, {})[numbered[2]] = weight
    return Stage([folder], [our_names({**flat, **_named(by_layer)})])


def _know_vocabulary(args: Any, states: Mapping[str, Any]) -> None:
    """args may know the padded size only, and DeepSpeed cut the padding off."""
    whole = (states.get("universal_checkpoint_info") or {}).get("original_vocab_size")
    if args is not None and whole and not getattr(args, "vocab_size", None):
        args.vocab_size = whole


def _halves_are_cut(args: Any) -> bool:
    """Without args nobody knows, so that they may be."""
    if args is None:
        return True
    return bool(getattr(args, "swiglu", False)) and int(getattr(args, "tensor_model_parallel_size", 1)) > 1


def _named(layers: Mapping[int, Weights]) -> Weights:
    """Of a pipeline's layers, told by what they hold: the names of the whole model."""
    found: Weights = {}
    num_blocks = 0
    for number in sorted(layers):
        weights = layers[number]
        if any(name.startswith("self_attention.") for name in weights):
            prefix = f"encoder.layers.{num_blocks}."
            num_blocks += 1
        elif "word_embeddings.weight" in weights:
            prefix = "embedding."
        elif "lm_head.weight" in weights:
            found[OUTPUT] = weights["lm_head.weight"]
            continue
        else:
            prefix = "encoder.final_layernorm."
        found |= {f"{prefix}{name}": weight for name, weight in weights.items()}
    return found
