"""What a config.json says of positions: rotary base and scaling, layers that do not turn, windows.

Wherever this or an earlier version of transformers wrote it. Knows no file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_sps2.config import RopeScaling

Config = Mapping[str, Any]
SLIDING, FULL = "sliding_attention", "full_attention"


def refuse(path: Path, allowed: Mapping[str, tuple[Any, ...]], config: Config) -> None:
    """Raises ValueError naming an entry whose value is not among the allowed ones; None is always allowed."""
    for name, values in allowed.items():
        found = config.get(name)
        if found is not None and found not in values:
            raise ValueError(
                f"{path}: {name}={found!r} is not supported; only {' or '.join(map(repr, values))} is"
            )


def positions(config: Config, path: Path) -> tuple[float, RopeScaling | None, int]:
    """The rotary base, its scaling and the longest context, wherever this version of transformers wrote them.

    `dynamic` stretches the frequencies of all tokens by how many there are, so that keys would change as an
    answer grows: it is served up to the length at which it begins to, where it is the same as no scaling.
    """
    rope: Config = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope = rope.get("full_attention", rope)  # Gemma 3 has others for layers with windows
    base = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    longest = int(config["max_position_embeddings"])
    original = int(
        config.get("original_max_position_embeddings")
        or rope.get("original_max_position_embeddings")
        or longest
    )
    refuse(path, {"partial_rotary_factor": (1, 1.0)}, {**config, **rope})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("long_factor"):  # Phi-3's first configs call longrope su or yarn
        kind = "longrope"
    if kind == "default":
        return base, None, longest
    if kind == "dynamic":
        return base, None, original
    if kind not in ("linear", "llama3", "yarn"):
        raise ValueError(
            f"{path}: rope_scaling of type {kind!r} is not supported; only default, linear, dynamic, llama3 "
            "and yarn are"
        )
    factor = float(rope.get("factor") or longest / original)
    if kind == "yarn":
        longest = max(longest, int(factor * original))
    return base, _scaling(kind, factor, original, rope), longest


def _scaling(kind: Any, factor: float, original: int, rope: Config) -> RopeScaling:
    if kind == "linear":
        return RopeScaling(kind=kind, factor=factor, original_max_seq_len=original)
    if kind == "llama3":
        return RopeScaling(
            kind=kind,
            factor=factor,
            original_max_seq_len=original,
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
        )
    return RopeScaling(
        kind=kind,
        factor=factor,
        original_max_seq_len=original,
        beta_fast=float(rope.get("beta_fast") or 32.0),
        beta_slow=float(rope.get("beta_slow") or 1.0),
        attention_factor=_attention_factor(factor, rope),
        truncate=bool(rope.get("truncate", True)),
    )


def _attention_factor(factor: float, rope: Config) -> float:
    """yarn's growth of queries and keys: as given, else of `factor` (arXiv 2309.00071, equation 22)."""

    def growth(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return growth(rope["mscale"]) / growth(rope["mscale_all_dim"])
    return growth(1.0)


def no_rope_layers(config: Config) -> tuple[int, ...]:
    """Hugging Face's list says 1 for a layer that turns."""
    count = int(config["num_hidden_layers"])
    every = int(config.get("no_rope_layer_interval") or 4)
    turns = config.get("no_rope_layers") or [(layer + 1) % every for layer in range(count)]
    return tuple(layer for layer in range(count) if not turns[layer])


def windows(config: Config, path: Path, family_rule: str, longest: int) -> tuple[int | None, tuple[int, ...]]:
    """(tokens that windowed layers see, those layers); (None, ()) where every token sees all earlier ones.

    family_rule: which layers have one where the config does not list them.
    """
    window, types = config.get("sliding_window"), config.get("layer_types")
    if unknown := set(types or ()) - {SLIDING, FULL}:
        raise ValueError(
            f"{path}: layer_types has {sorted(unknown)[0]!r}; only {SLIDING} and {FULL} are known"
        )
    if window is None or not config.get("use_sliding_window", True):
        return None, ()
    # Gemma 3's layers with windows turn by a base of their own, however long the windows are.
    if int(window) >= longest and family_rule != "pattern":
        return None, ()
    count = int(config["num_hidden_layers"])
    if types:
        layers = tuple(layer for layer, kind in enumerate(types) if kind == SLIDING)
    elif family_rule == "all":
        layers = tuple(range(count))
    elif family_rule == "late":
        layers = tuple(range(int(config.get("max_window_layers", 28)), count))
    elif family_rule == "pattern":
        every = int(config.get("sliding_window_pattern") or 6)
        layers = tuple(layer for layer in range(count) if (layer + 1) % every)
    else:
        raise ValueError(
            f"{path}: sliding_window={window} is not supported: a {config['model_type']} model must say in "
            "layer_types which layers it is for"
        )
    return (int(window), layers) if layers else (None, ())


def window_rotary_base(config: Config, path: Path) -> float:
    """Gemma 3's, of layers with windows; they are not scaled."""
    rope = (config.get("rope_parameters") or {}).get(SLIDING) or {}
    refuse(path, {"rope_type": ("default",)}, rope)
    return float(rope.get("rope_theta") or config.get("rope_local_base_freq") or 10000.0)
