"""From ModelConfig to a Megatron GPTModel with our core attention in its slot.

Knows Megatron's config and specs; knows neither where the sequence lies nor what attention does with it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import megatron_sps2.model.eager  # noqa: F401  # isort: skip  # before anything of Megatron

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import CoreAttentionBuilder
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from megatron_sps2.config import ModelConfig
from megatron_sps2.model.gemma import GemmaNorm, with_norm
from megatron_sps2.model.linear import CpuColumnParallelLinear, CpuRowParallelLinear
from megatron_sps2.model.moe import moe_layer

NORMS = {"rms": "RMSNorm", "layer": "LayerNorm"}
ACTIVATIONS = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": functools.partial(F.gelu, approximate="tanh")}


def transformer_config(model: ModelConfig, tp_size: int, dtype: torch.dtype) -> TransformerConfig:
    """Megatron's config for inference: no dropout, no fusion that needs CUDA, no weights drawn."""
    experts = {}
    if model.num_experts:
        experts = {
            "num_moe_experts": model.num_experts,
            "moe_router_topk": model.experts_per_token,
            "moe_router_pre_softmax": not model.normalize_experts,
            "moe_router_load_balancing_type": "none",
            "moe_ffn_hidden_size": model.ffn_hidden_size,
        }
    return TransformerConfig(
        **experts,
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        layernorm_epsilon=model.norm_epsilon,
        normalization=NORMS[model.norm],
        activation_func=ACTIVATIONS[model.activation],
        gated_linear_unit=model.gated,
        add_bias_linear=model.linear_bias,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        # The checkpoint brings every weight; drawing random ones first only costs time.
        perform_initialization=False,
        use_cpu_initialization=True,
        tensor_model_parallel_size=tp_size,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
    )


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """The smallest multiple of tp_size that holds the vocabulary: every tp rank holds equally many rows."""
    return -(-vocab_size // tp_size) * tp_size


def norm_builder(model: ModelConfig) -> Callable[..., nn.Module]:
    """NVIDIA apex's fused RMSNorm where it can be imported and run (CUDA), else torch's norms.

    The PyPI package named `apex` is something else: it has no FusedRMSNorm and is passed over.
    """
    if model.is_gemma:
        return GemmaNorm
    if model.norm != "rms":
        return WrappedTorchNorm
    try:
        from apex.normalization import FusedRMSNorm
    except ImportError:
        return WrappedTorchNorm
    return functools.partial(_apex_norm, FusedRMSNorm) if torch.cuda.is_available() else WrappedTorchNorm


def _apex_norm(norm: type[nn.Module], config: TransformerConfig, hidden_size: int, eps: float) -> nn.Module:
    return norm(hidden_size, eps=eps)


def layer_spec(
    model: ModelConfig,
    pg_collection: ProcessGroupCollection,
    core_attention: CoreAttentionBuilder,
    device: torch.device,
) -> ModuleSpec:
    """Megatron's local layer spec with `core_attention` in its slot, and on CPU our linears in theirs."""
    spec = get_gpt_layer_local_spec(normalization=NORMS[model.norm], qk_layernorm=model.qk_norm)
    attention, mlp = spec.submodules.self_attention.submodules, spec.submodules.mlp.submodules
    attention.core_attention = core_attention
    spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = norm_builder(model)
    if model.qk_norm:
        attention.q_layernorm = attention.k_layernorm = norm_builder(model)
    if device.type == "cpu":
        attention.linear_qkv = mlp.linear_fc1 = CpuColumnParallelLinear
        attention.linear_proj = mlp.linear_fc2 = CpuRowParallelLinear
    if model.is_gemma:
        attention.linear_proj = mlp.linear_fc2 = with_norm(attention.linear_proj)
    if model.num_experts:
        spec.submodules.mlp = moe_layer(mlp, pg_collection)
    return spec


def build_gpt(
    model: ModelConfig,
    pg_collection: ProcessGroupCollection,
    core_attention: CoreAttentionBuilder,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> GPTModel:
    """This tp rank's shard of the model, weights uninitialised, frozen and in eval mode.

    pg_collection: tp, cp and pp (both of one rank) and embd (None). Megatron's parallel_state is never used.
    """
    tp_size = pg_collection.tp.size()
    config = transformer_config(model, tp_size, dtype)
    layers = TransformerBlockSubmodules(
        layer_specs=[layer_spec(model, pg_collection, core_attention, torch.device(device))]
        * model.num_layers,
        layer_norm=norm_builder(model),
    )
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=layers,
        vocab_size=padded_vocab_size(model.vocab_size, tp_size),
        max_sequence_length=model.max_seq_len,
        parallel_output=True,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="learned_absolute" if model.learned_positions else "none",
        pg_collection=pg_collection,
    )
    return gpt.to(device=device, dtype=dtype).requires_grad_(False).eval()
