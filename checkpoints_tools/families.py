"""Which model families are served, each by its config: Hugging Face's config.json -> ModelConfig.

What the model floor does not compute is refused by name: nothing of a config is ignored. Knows no file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints_tools import gemma, gpt2
from checkpoints_tools.positions import Config, no_rope_layers, positions, refuse, windows
from megatron_sps2.config import ModelConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How a family differs from Llama, and what its config.json means where it is silent."""

    qkv_bias: bool = False
    qk_norm: bool = False
    has_no_rope_layers: bool = False
    has_experts: bool = False
    is_gemma: bool = False
    windows: str = ""  # which layers have one where the config does not say; "": none may
    # Entries that transformers' config class fills in.
    defaults: Config = field(default_factory=dict)
    # Weights that the files hold as one: its name -> those of its parts, from the first row on.
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


# Qwen's windows, unless the config switches them on.
NO_WINDOW = {"use_sliding_window": False, "sliding_window": 4096}

# By model_type. Yi and SmolLM2 call themselves llama, Phi-4 phi3.
FAMILIES = {
    "gemma3_text": Family(qk_norm=True, is_gemma=True, windows="pattern", defaults=gemma.DEFAULTS),
    "gpt2": Family(),
    "llama": Family(),
    "mistral": Family(windows="all", defaults={"sliding_window": 4096}),
    "mixtral": Family(
        has_experts=True,
        windows="all",
        defaults={"num_local_experts": 8, "num_experts_per_tok": 2, "rope_theta": 1_000_000.0},
    ),
    "phi3": Family(
        fused={"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")},
        windows="all",
    ),
    "qwen2": Family(qkv_bias=True, windows="late", defaults=NO_WINDOW),
    "qwen3": Family(qk_norm=True, windows="late", defaults={**NO_WINDOW, "head_dim": 128}),
    "qwen3_moe": Family(
        qk_norm=True,
        has_experts=True,
        windows="all",
        defaults={**NO_WINDOW, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": False},
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
            refuse(path, gpt2.ALLOWED, config)
            return gpt2.gpt2_model(config, eos)
        heads = int(config["num_attention_heads"])
        base, scaling, longest = positions(config, path)
        window, window_layers = windows(config, path, family.windows, longest)
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
            no_rope_layers=no_rope_layers(config) if family.has_no_rope_layers else (),
            window=window,
            window_layers=window_layers,
            **(gemma.gemma_model(config, path) if family.is_gemma else {}),
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
    "gemma3": "it sees pictures; its text model alone, gemma3_text, is",
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
    if family.is_gemma:
        allowed = dict(gemma.ALLOWED)
    if not family.qkv_bias:  # whose biases the config does not mention
        allowed["attention_bias"] = (False,)
    refuse(path, allowed, config)
    if config.get("quantization_config"):
        raise ValueError(f"{path}: quantization_config is not supported; convert from the unquantised model")


def _mlp(config: Config, path: Path, family: Family) -> dict[str, Any]:
    """The MLPs' size, and of mixtures how many experts there are."""
    if not family.has_experts:
        return {"ffn_hidden_size": int(config["intermediate_size"])}
    refuse(
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
