"""Gemma 3's config.json <-> ModelConfig: norms after attention and MLP too, GELU, two rotary bases."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoints_tools.positions import FULL, SLIDING, window_rotary_base
from megatron_sps2.config import ModelConfig

DEFAULTS: dict[str, Any] = {
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}
# Another value computes something else.
ALLOWED: dict[str, tuple[Any, ...]] = {
    "hidden_activation": ("gelu_pytorch_tanh",),
    "attention_bias": (False,),
    "final_logit_softcapping": (None,),
    "attn_logit_softcapping": (None,),
    "use_bidirectional_attention": (False,),
}


def gemma_model(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """What ModelConfig has beside Llama's."""
    return {
        "is_gemma": True,
        "activation": "gelu_tanh",
        "attention_scalar": int(config["query_pre_attn_scalar"]),
        "window_rotary_base": window_rotary_base(config, path),
    }


def gemma_config(model: ModelConfig, rope_scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """The entries of config.json that a Llama has not, or otherwise."""
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": model.attention_scalar or model.head_dim,
        # transformers 4 reads this, and the entries that all families have; 5 reads the next.
        "rope_local_base_freq": model.window_rotary_base or model.rotary_base,
        "rope_parameters": {
            FULL: {"rope_type": "default", "rope_theta": model.rotary_base, **(rope_scaling or {})},
            SLIDING: {"rope_type": "default", "rope_theta": model.window_rotary_base or model.rotary_base},
        },
    }
