"""Which model families are served, each by its config: Hugging Face's config.json -> ModelConfig.

What the model floor does not compute is refused by name: nothing of a config is ignored. Knows no file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints_tools import gpt2
from megatron_sps2.config import DType, ModelConfig, RopeScaling

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How a family differs from Llama, and what its config.json means where it is silent."""

    qkv_bias: bool = False
    qk_norm: bool = False
    has_no_rope_layers: bool = False
    has_experts: bool = False
    # Entries that transformers' config class fills in.
    defaults: Config = field(default_factory=dict)
    # Weights that the files hold as one: its name -> those of its parts, from the first row on.
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


# By model_type. Yi and SmolLM2 call themselves llama, Phi-4 phi3.
FAMILIES = {
    "gpt2": Family(),
    "llama": Family(),
    "mistral": Family(),
    "mixtral": Family(has_experts=True, defaults={"num_local_experts": 8, "num_experts_per_tok": 2}),
    "phi3": Family(
        fused={"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    ),
    "qwen2": Family(qkv_bias=True, defaults={"use_sliding_window": False}),
    "qwen3": Family(qk_norm=True, defaults={"use_sliding_window": False, "head_dim": 128}),
    "qwen3_moe": Family(
        qk_norm=True,
        has_experts=True,
        defaults={"use_sliding_window": False, "num_experts_per_tok": 8, "norm_topk_prob": False},
    ),
    "smollm3": Family(
        has_no_rope_layers=True,
        defaults={
            "use_sliding_window": False,
            "tie_word_embeddings": True,
            "rope_theta": 2_000_000.0,
        },
    ),
}


def model_config(config: Config, path: Path, generation: Config) -> ModelConfig:
    """config.json, generation_config.json -> ModelConfig. Raises ValueError naming what is not supported."""
    family = _family(config, path)
    config = {**family.defaults, **config}
    eos = _ids(generation.get("eos_token_id", config.get("eos_token_id")))
    _check_supported(config, path, family)
    try:
        if config["model_type"] == "gpt2":
            _refuse(path, gpt2.ALLOWED, config)
            return gpt2.gpt2_model(config, eos)
        heads = int(config["num_attention_heads"])
        base, scaling, longest = _positions(config, path)
        _check_window(config, path, longest)
        return ModelConfig(
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=int(config["hidden_size"]),
            **_mlp(config, path, family),
            num_attention_heads=heads,
            num_query_groups=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            vocab_size=int(config["vocab_size"]),
            max_seq_len=longest,
            norm_epsilon=float(config["rms_norm_eps"]),
            rotary_base=base,
            rope_scaling=scaling,
            no_rope_layers=_no_rope_layers(config) if family.has_no_rope_layers else (),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            tie_embeddings=bool(config.get("tie_word_embeddings", False)),
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=eos,
        )
    except KeyError as error:
        kind = config["model_type"]
        raise ValueError(f"{path} has no {error.args[0]!r}, which a {kind} model needs") from None


# Known, and not served: why.
REFUSED = {
    "gemma3_text": "its blocks end with norms, which Megatron's local layers have no place for",
    "gemma3": "it sees pictures, and its blocks end with norms",
    "qwen2_moe": "its MLPs are mixtures beside a dense one",
}


def _family(config: Config, path: Path) -> Family:
    kind = config.get("model_type")
    if kind in REFUSED:
        raise ValueError(f"{path}: model_type={kind!r} is not supported: {REFUSED[kind]}")
    if kind not in FAMILIES:
        raise ValueError(f"{path}: model_type={kind!r} is not supported; only {', '.join(FAMILIES)} are")
    return FAMILIES[kind]


def _check_supported(config: Config, path: Path, family: Family) -> None:
    allowed: dict[str, tuple[Any, ...]] = {"hidden_act": ("silu", "swish"), "mlp_bias": (False,)}
    if not family.qkv_bias:  # whose biases the config does not mention
        allowed["attention_bias"] = (False,)
    _refuse(path, allowed, config)
    _refuse(path, {"layer_types": (["full_attention"] * int(config.get("num_hidden_layers", 0)),)}, config)
    if config.get("quantization_config"):
        raise ValueError(f"{path}: quantization_config is not supported; convert from the unquantised model")


def _check_window(config: Config, path: Path, longest: int) -> None:
    window = config.get("sliding_window")
    if config.get("use_sliding_window", True) and window is not None and window < longest:
        raise ValueError(
            f"{path}: sliding_window={window} is not supported, every token sees all earlier ones; "
            f"set max_position_embeddings={window} to stay inside the window"
        )


def _refuse(path: Path, allowed: Mapping[str, tuple[Any, ...]], config: Config) -> None:
    for name, values in allowed.items():
        found = config.get(name)
        if found is not None and found not in values:
            raise ValueError(
                f"{path}: {name}={found!r} is not supported; only {' or '.join(map(repr, values))} is"
            )


def _positions(config: Config, path: Path) -> tuple[float, RopeScaling | None, int]:
    """The rotary base, its scaling and the longest context, wherever this version of transformers wrote them.

    `dynamic` stretches the frequencies of all tokens by how many there are, so that keys would change as an
    answer grows: it is served up to the length at which it begins to, where it is the same as no scaling.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    longest = int(config["max_position_embeddings"])
    original = int(
        config.get("original_max_position_embeddings")
        or rope.get("original_max_position_embeddings")
        or longest
    )
    _refuse(path, {"partial_rotary_factor": (1, 1.0)}, {**config, **rope})
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


def _no_rope_layers(config: Config) -> tuple[int, ...]:
    """Hugging Face's list says 1 for a layer that turns."""
    count = int(config["num_hidden_layers"])
    every = int(config.get("no_rope_layer_interval") or 4)
    turns = config.get("no_rope_layers") or [(layer + 1) % every for layer in range(count)]
    return tuple(layer for layer in range(count) if not turns[layer])


def _mlp(config: Config, path: Path, family: Family) -> dict[str, Any]:
    """The MLPs' size, and of mixtures how many experts there are."""
    if not family.has_experts:
        return {"ffn_hidden_size": int(config["intermediate_size"])}
    _refuse(
        path, {"decoder_sparse_step": (1,), "mlp_only_layers": ([],), "router_jitter_noise": (0, 0.0)}, config
    )
    is_mixtral = config["model_type"] == "mixtral"
    return {
        "ffn_hidden_size": int(config["intermediate_size" if is_mixtral else "moe_intermediate_size"]),
        # transformers 5 writes num_local_experts for both.
        "num_experts": int(config.get("num_local_experts") or config["num_experts"]),
        "experts_per_token": int(config["num_experts_per_tok"]),
        "normalize_experts": is_mixtral or bool(config["norm_topk_prob"]),
    }


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)


def hf_config(model: ModelConfig, dtype: DType) -> dict[str, Any]:
    """config.json of a model, as the family that computes the same: model_config's inverse.

    A Mistral, Yi or Phi-3 model comes back as the Llama that it is.
    """
    if model.learned_positions:
        return gpt2.gpt2_config(model, dtype)
    kind, name = _kind(model)
    config = {
        "architectures": [name],
        "model_type": kind,
        "hidden_act": "silu",
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_query_groups,
        "head_dim": model.head_dim,
        "vocab_size": model.vocab_size,
        "max_position_embeddings": model.max_seq_len,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": model.rotary_base,
        "rope_scaling": _rope_entry(model.rope_scaling),
        "tie_word_embeddings": model.tie_embeddings,
        "bos_token_id": model.bos_token_id,
        "eos_token_id": list(model.eos_token_ids) or None,
        "torch_dtype": dtype,
    }
    if model.num_experts:
        config |= {
            "num_local_experts": model.num_experts,
            "num_experts_per_tok": model.experts_per_token,
        }
    if kind == "qwen3_moe":
        config |= {
            "num_experts": model.num_experts,
            "moe_intermediate_size": model.ffn_hidden_size,
            "norm_topk_prob": model.normalize_experts,
        }
    if kind == "smollm3":
        turns = [int(layer not in model.no_rope_layers) for layer in range(model.num_layers)]
        config |= {"no_rope_layers": turns, "pad_token_id": None}
    return config


def _kind(model: ModelConfig) -> tuple[str, str]:
    """model_type and transformers' class. Raises ValueError for a mixture that no family has."""
    switches = model.qkv_bias, model.qk_norm, bool(model.no_rope_layers), bool(model.num_experts)
    kinds = {
        (False, False, False, False): ("llama", "LlamaForCausalLM"),
        (True, False, False, False): ("qwen2", "Qwen2ForCausalLM"),
        (False, True, False, False): ("qwen3", "Qwen3ForCausalLM"),
        (False, False, True, False): ("smollm3", "SmolLM3ForCausalLM"),
        (False, False, False, True): ("mixtral", "MixtralForCausalLM"),
        (False, True, False, True): ("qwen3_moe", "Qwen3MoeForCausalLM"),
    }
    if switches not in kinds:
        raise ValueError(
            f"no family has qkv_bias={model.qkv_bias}, qk_norm={model.qk_norm}, no_rope_layers="
            f"{model.no_rope_layers} and num_experts={model.num_experts} together; write a Megatron "
            "checkpoint instead"
        )
    return kinds[switches]


def _rope_entry(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    entry: dict[str, Any] = {
        "rope_type": scaling.kind,
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_seq_len,
    }
    if scaling.kind == "llama3":
        return entry | {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
        }
    if scaling.kind == "yarn":
        names = ("beta_fast", "beta_slow", "attention_factor", "truncate")
        return entry | {name: getattr(scaling, name) for name in names}
    return entry
