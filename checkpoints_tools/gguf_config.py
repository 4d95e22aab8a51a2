"""A GGUF file's metadata -> ModelConfig, by way of the config.json of the same model.

Knows what keys mean, by architecture; families.py knows what a config.json means.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.families import model_config
from checkpoints_tools.gguf_metadata import Metadata
from megatron_sps2.config import ModelConfig, RopeScaling
from megatron_sps2.model.rotary import inverse_frequencies

# The metadata does not say what rope_freqs.weight was made from: of Llama 3.1 and 3.3, and of Llama 3.2.
_LLAMA3 = tuple(RopeScaling(kind="llama3", factor=each, original_max_seq_len=8192) for each in (8.0, 32.0))


def read_model(
    metadata: Metadata, shapes: Mapping[str, tuple[int, ...]], divisors: Tensor | None
) -> ModelConfig:
    """shapes: of all tensors, by GGUF's names. divisors: of the rotary frequencies, [d/2].

    Raises ValueError naming the key that is missing or not supported, and its value.
    """
    common = {
        "model_type": metadata.architecture,
        "vocab_size": _vocab_size(metadata, shapes),
        "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": metadata.of_file("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.of_file("tokenizer.ggml.eos_token_id"),
    }
    config = _gpt2_config(metadata) if metadata.architecture == "gpt2" else _llama_config(metadata)
    model = model_config({**common, **config}, metadata.path, {})
    if divisors is not None:
        model = dataclasses.replace(model, rope_scaling=_llama3(metadata, model, divisors))
    window = metadata.optional("attention.sliding_window", 0)
    if 0 < window < model.max_seq_len:
        raise metadata.refusal("attention.sliding_window", window, "it does not say for which layers")
    metadata.check_understood()
    return model


def _llama_config(metadata: Metadata) -> dict[str, Any]:
    """config.json of Llama and its relatives, less what all families have."""
    hidden, heads = _hidden_and_heads(metadata)
    head_dim = metadata.optional("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if (found := metadata.optional(key, head_dim)) != head_dim:
            raise metadata.refusal(key, found, f"it must be head_dim={head_dim}")
    return {
        "num_hidden_layers": metadata.required("block_count"),
        "hidden_size": hidden,
        "intermediate_size": metadata.required("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.optional("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.required("context_length"),
        "rms_norm_eps": metadata.required("attention.layer_norm_rms_epsilon"),
        "rope_theta": metadata.optional("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(metadata),
        # What llama.cpp computes; no key says so.
        "no_rope_layer_interval": 4,
    }


def _gpt2_config(metadata: Metadata) -> dict[str, Any]:
    hidden, heads = _hidden_and_heads(metadata)
    for key, only in {
        "attention.head_count_kv": heads,
        "attention.key_length": hidden // heads,
        "attention.value_length": hidden // heads,
    }.items():
        if (found := metadata.optional(key, only)) != only:
            raise metadata.refusal(key, found, f"it must be {only}")
    return {
        "n_layer": metadata.required("block_count"),
        "n_embd": hidden,
        "n_inner": metadata.required("feed_forward_length"),
        "n_head": heads,
        "n_positions": metadata.required("context_length"),
        "layer_norm_epsilon": metadata.required("attention.layer_norm_epsilon"),
        # What llama.cpp computes; no key says so.
        "activation_function": "gelu_new",
    }


def _hidden_and_heads(metadata: Metadata) -> tuple[int, int]:
    heads = metadata.required("attention.head_count")
    if heads < 1:
        raise metadata.refusal("attention.head_count", heads, "it must be at least 1")
    return metadata.required("embedding_length"), heads


def _rope_scaling(metadata: Metadata) -> dict[str, Any] | None:
    """A factor alone is linear, as it was before there was a type."""
    kind = metadata.optional("rope.scaling.type", "linear")
    factor = metadata.optional("rope.scaling.factor") or metadata.optional("rope.scale_linear")
    said = {
        "original_max_position_embeddings": metadata.optional("rope.scaling.original_context_length"),
        "beta_fast": metadata.optional("rope.scaling.yarn_beta_fast"),
        "beta_slow": metadata.optional("rope.scaling.yarn_beta_slow"),
    }
    if kind not in ("none", "linear", "yarn"):
        raise metadata.refusal("rope.scaling.type", kind, "only none, linear and yarn are")
    if kind == "none" or (factor or 1.0) == 1.0:
        return None
    return {"rope_type": kind, "factor": factor, **said}


def _llama3(metadata: Metadata, model: ModelConfig, divisors: Tensor) -> RopeScaling:
    """The published scaling that divides the frequencies so; which of two that divide alike is all one."""
    if model.rope_scaling is not None:
        raise ValueError(
            f"{metadata.path}: rope_freqs.weight beside rope.scaling.type={model.rope_scaling.kind!r} is not "
            "supported; frequencies are scaled by one of them"
        )
    plain = inverse_frequencies(model.head_dim, model.rotary_base)
    for scaling in _LLAMA3:
        scaled = inverse_frequencies(model.head_dim, model.rotary_base, scaling)
        # 1e-5: what fp32 leaves of 1 / ((1 - s) / factor + s); a factor of 8.001 is off by 1e-4.
        if divisors.shape == plain.shape and torch.allclose(plain / divisors, scaled, rtol=1e-5, atol=0):
            return scaling
    raise ValueError(
        f"{metadata.path}: rope_freqs.weight of shape {tuple(divisors.shape)}, {divisors.min().item():g} to "
        f"{divisors.max().item():g}, is not supported: it is neither Llama 3.1's (factor 8) nor Llama 3.2's "
        "(factor 32), both with low 1, high 4 and original length 8192"
    )


def _vocab_size(metadata: Metadata, shapes: Mapping[str, tuple[int, ...]]) -> int:
    embedding = shapes.get("token_embd.weight")
    return int(metadata.required("vocab_size")) if embedding is None else embedding[0]
