"""Bytes that one rank needs for a model: weights, KV cache, and what a prefill holds for a while.

Formulas only: no torch, no machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sps2.config import DType, KVCacheDType, ModelConfig, ParallelConfig
from megatron_sps2.engine.engine_config import EngineConfig

ELEMENT_SIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
SCALE_SIZE = 4  # beside each row of float8


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemory:
    """`kv_tokens` are what the cache holds; `activations` is about what the prefill of its part holds."""

    weights: int
    kv: int
    kv_tokens: int
    kv_per_token: int
    activations: int

    @property
    def kept(self) -> int:
        return self.weights + self.kv

    @property
    def total(self) -> int:
        return self.kept + self.activations


def rank_memory(
    model: ModelConfig,
    parallel: ParallelConfig,
    *,
    dtype: DType,
    kv_cache_dtype: KVCacheDType = "auto",
    max_model_len: int,
    block_size: int,
    output_copy: bool,
) -> RankMemory:
    """Of one request of `max_model_len` tokens."""
    config = EngineConfig(
        checkpoint="", parallel=parallel, max_model_len=max_model_len, block_size=block_size
    )
    tokens, size = config.sized_cache().tokens_per_rank, ELEMENT_SIZE[dtype]
    per_token = model.num_layers * kv_layer_bytes(model, parallel.tp_size, dtype, kv_cache_dtype)
    return RankMemory(
        weights=num_weights(model, parallel.tp_size, output_copy) * size,
        kv=tokens * per_token,
        kv_tokens=tokens,
        kv_per_token=per_token,
        activations=-(-max_model_len // parallel.sp_size) * _row(model, parallel.tp_size) * size,
    )


def kv_layer_bytes(model: ModelConfig, tp_size: int, dtype: DType, kv_cache_dtype: KVCacheDType) -> int:
    """K and V of one token in one layer, as one rank's cache keeps them."""
    row = model.head_dim * ELEMENT_SIZE[dtype] if kv_cache_dtype == "auto" else model.head_dim + SCALE_SIZE
    return 2 * (model.num_query_groups // tp_size) * row


def num_weights(model: ModelConfig, tp_size: int, output_copy: bool) -> int:
    """Elements that one tp rank keeps; `output_copy`: the output layer has a matrix of its own."""
    hidden, ffn = model.hidden_size, (1 + model.gated) * model.ffn_hidden_size
    q_size, kv_size = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
    mlp = (ffn + model.ffn_hidden_size) * hidden * (model.num_experts or 1)
    shared = (2 * q_size + 2 * kv_size) * hidden + mlp
    shared += (q_size + 2 * kv_size) * (model.qkv_bias or model.linear_bias) + ffn * model.linear_bias
    whole = hidden * (2 * model.linear_bias + model.num_experts) + 2 * model.head_dim * model.qk_norm
    norm = hidden * (1 + (model.norm == "layer"))
    rows = -(-model.vocab_size // tp_size)  # the vocabulary is padded to a multiple of tp_size
    embeddings = (1 + output_copy) * rows * hidden + model.max_seq_len * hidden * model.learned_positions
    norms = (4 if model.is_gemma else 2) * norm
    return model.num_layers * (shared // tp_size + whole + norms) + embeddings + norm


def paused_row_bytes(model: ModelConfig, dtype: DType) -> int:
    """Of one token on the rank that computes it, between two layers.

    Its hidden state, its angles, their cosines and sines where kernels turn by them, and its slot.
    """
    num_angles = 0 if model.learned_positions else model.head_dim * (2 if model.window_rotary_base else 1)
    size = ELEMENT_SIZE[dtype]
    return model.hidden_size * size + num_angles * (4 + 2 * size) + 8


def _row(model: ModelConfig, tp_size: int) -> int:
    """Elements per token while a layer runs: the residual and its norms, q, k, v in two layouts, the MLP."""
    qkv = (model.num_attention_heads + 2 * model.num_query_groups) * model.head_dim
    mlp = (2 + model.gated) * model.ffn_hidden_size * (model.experts_per_token or 1)
    return 4 * model.hidden_size + (3 * qkv + mlp) // tp_size
