"""GPT-2's config.json <-> ModelConfig: learned positions, LayerNorm, GELU, biases everywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_sps2.config import DType, ModelConfig

ACTIVATIONS: dict[str, Any] = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# Another value computes something else.
ALLOWED: dict[str, tuple[Any, ...]] = {
    "activation_function": tuple(ACTIVATIONS),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


def gpt2_model(config: Mapping[str, Any], eos_token_ids: tuple[int, ...]) -> ModelConfig:
    """Raises KeyError for an entry that is missing."""
    heads, hidden = int(config["n_head"]), int(config["n_embd"])
    return ModelConfig(
        num_layers=int(config["n_layer"]),
        hidden_size=hidden,
        ffn_hidden_size=int(config.get("n_inner") or 4 * hidden),
        num_attention_heads=heads,
        num_query_groups=heads,
        head_dim=hidden // heads,
        vocab_size=int(config["vocab_size"]),
        max_seq_len=int(config["n_positions"]),
        norm_epsilon=float(config.get("layer_norm_epsilon") or 1e-5),
        norm="layer",
        activation=ACTIVATIONS[config.get("activation_function") or "gelu_new"],
        gated=False,
        linear_bias=True,
        learned_positions=True,
        tie_embeddings=bool(config.get("tie_word_embeddings", True)),
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=eos_token_ids,
    )


def gpt2_config(model: ModelConfig, dtype: DType) -> dict[str, Any]:
    """gpt2_model's inverse."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": model.num_layers,
        "n_embd": model.hidden_size,
        "n_inner": model.ffn_hidden_size,
        "n_head": model.num_attention_heads,
        "n_positions": model.max_seq_len,
        "vocab_size": model.vocab_size,
        "layer_norm_epsilon": model.norm_epsilon,
        "activation_function": "gelu_new" if model.activation == "gelu_tanh" else "gelu",
        "tie_word_embeddings": model.tie_embeddings,
        "bos_token_id": model.bos_token_id,
        "eos_token_id": list(model.eos_token_ids) or None,
        "torch_dtype": dtype,
    }
