"""Megatron's command-line arguments, as its checkpoints keep them <-> ModelConfig. Plain values."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from megatron_sps2.config import DType, ModelConfig, RopeScaling
from megatron_sps2.model.spec import NORMS

logger = logging.getLogger(__name__)

# What the model floor computes; another value means another model.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "normalization": ("RMSNorm", "LayerNorm", "rmsnorm", "layernorm"),
    "position_embedding_type": ("rope", "learned_absolute"),
    "squared_relu": (False,),
    "openai_gelu": (False, True),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False,),
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "no_rope_freq": (None, 0),
    "qk_l2_norm": (False,),
    "softmax_type": ("vanilla",),
    "activation_func_clamp_value": (None,),
    "glu_linear_offset": (0, 0.0),
    "moe_apply_probs_on_input": (False,),
    "moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss", "global_aux_loss", "none", ["aux_loss"]),
    "moe_layer_freq": (1,),
    "moe_grouped_gemm": (False,),
    "moe_shared_expert_intermediate_size": (None,),
    "moe_router_score_function": ("softmax",),
    "moe_router_enable_expert_bias": (False,),
    "moe_router_topk_scaling_factor": (None,),
    "moe_router_num_groups": (None,),
    "expert_model_parallel_size": (1,),
    "multi_latent_attention": (False,),
    "window_size": (None,),
    "transformer_impl": ("local", "transformer_engine"),
}


def model_config(args: Any, path: Path) -> ModelConfig:
    """Raises ValueError naming the argument that is missing or not supported."""
    if args is None:
        raise ValueError(f"{path} holds no args, so its model's shape is not known; add sps2_model.json")
    values = dict(args) if isinstance(args, dict) else vars(args)
    for name, allowed in _ALLOWED.items():
        if name in values and values[name] not in allowed:
            shown = " or ".join(map(repr, allowed))
            raise ValueError(f"{path}: args.{name}={values[name]!r} is not supported; only {shown} is")
    try:
        heads, hidden = int(values["num_attention_heads"]), int(values["hidden_size"])
        learned = values.get("position_embedding_type", "learned_absolute") == "learned_absolute"
        # Megatron's fused GELU is the one by tanh, whether asked for or not.
        is_by_tanh = values.get("openai_gelu") or values.get("bias_gelu_fusion")
        gelu: Any = "gelu_tanh" if is_by_tanh else "gelu"
        grouped = values.get("group_query_attention", False)
        groups = values["num_query_groups"] if grouped else values.get("num_key_value_heads")  # DeepSpeed's
        return ModelConfig(
            num_layers=int(values["num_layers"]),
            hidden_size=hidden,
            **_mlp(values, path),
            num_attention_heads=heads,
            num_query_groups=int(groups or heads),
            head_dim=int(values.get("kv_channels") or hidden // heads),
            vocab_size=int(values.get("vocab_size") or values["padded_vocab_size"]),
            max_seq_len=int(values["max_position_embeddings"]),
            norm_epsilon=float(values.get("norm_epsilon") or values.get("layernorm_epsilon") or 1e-5),
            rotary_base=float(values.get("rotary_base") or values.get("rope_theta") or 10000.0),
            rope_scaling=_scaling(values),
            qkv_bias=bool(values.get("add_qkv_bias", False)),
            qk_norm=bool(values.get("qk_layernorm", False)),
            norm="layer" if values.get("normalization", "LayerNorm").lower() == "layernorm" else "rms",
            activation="silu" if values.get("swiglu") else gelu,
            gated=bool(values.get("swiglu", False)),
            linear_bias=bool(values.get("add_bias_linear", True)),
            learned_positions=learned and not values.get("use_rotary_position_embeddings"),
            tie_embeddings=not values.get("untie_embeddings_and_output_weights", False),
        )
    except KeyError as error:
        raise ValueError(f"{path}: args has no {error.args[0]!r}, which names the model's shape") from None


def _mlp(values: dict[str, Any], path: Path) -> dict[str, Any]:
    """Megatron-DeepSpeed counts the experts of each layer, in a list; its mixtures are called otherwise."""
    if values.get("num_experts") in (None, 0, [1]):
        return {"ffn_hidden_size": int(values["ffn_hidden_size"])}
    if not isinstance(values["num_experts"], int):
        found = values["num_experts"]
        raise ValueError(f"{path}: args.num_experts={found!r} is not supported; only a number is")
    return {
        "ffn_hidden_size": int(values.get("moe_ffn_hidden_size") or values["ffn_hidden_size"]),
        "num_experts": int(values["num_experts"]),
        "experts_per_token": int(values["moe_router_topk"]),
        "normalize_experts": not values.get("moe_router_pre_softmax", False),
    }


def _scaling(values: dict[str, Any]) -> RopeScaling | None:
    """Megatron's --use-rope-scaling is Llama 3.1's, with 8,192 and the factors 1 and 4 built in."""
    stretch = float(values.get("rotary_seq_len_interpolation_factor") or 1)
    if stretch != 1:
        longest = int(values["max_position_embeddings"])
        return RopeScaling(kind="linear", factor=stretch, original_max_seq_len=longest)
    if not values.get("use_rope_scaling"):
        return None
    factor = float(values.get("rope_scaling_factor") or 8.0)
    return RopeScaling(kind="llama3", factor=factor, original_max_seq_len=8192)


def make_args(
    model: ModelConfig, dtype: DType, tp_size: int, pp_size: int, padded: int
) -> argparse.Namespace:
    """What Megatron needs to build the model again, under its own names."""
    scaling = model.rope_scaling
    is_llama3 = scaling is not None and scaling.kind == "llama3"
    is_linear = scaling is not None and scaling.kind == "linear"
    known = RopeScaling(kind="llama3", factor=scaling.factor, original_max_seq_len=8192) if scaling else None
    untold = {
        f"no_rope_layers={model.no_rope_layers}": bool(model.no_rope_layers),
        f"window={model.window} of some layers": bool(model.window_layers),
        "Gemma's norms and scales": model.is_gemma,
        f"{scaling}": not (is_linear or scaling == known),
    }
    for what in (what for what, is_so in untold.items() if is_so):
        logger.warning(
            "Megatron's arguments cannot say %s; only sps2_model.json beside the shards does", what
        )
    return argparse.Namespace(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        group_query_attention=model.num_query_groups != model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.head_dim,
        vocab_size=model.vocab_size,
        padded_vocab_size=padded,
        make_vocab_size_divisible_by=padded // tp_size,
        max_position_embeddings=model.max_seq_len,
        seq_length=model.max_seq_len,
        norm_epsilon=model.norm_epsilon,
        normalization=NORMS[model.norm],
        num_experts=model.num_experts or None,
        moe_router_topk=model.experts_per_token or 2,
        moe_router_pre_softmax=not model.normalize_experts,
        moe_ffn_hidden_size=model.ffn_hidden_size if model.num_experts else None,
        moe_grouped_gemm=False,
        expert_model_parallel_size=1,
        swiglu=model.gated and model.activation == "silu",
        openai_gelu=model.activation == "gelu_tanh",
        bias_gelu_fusion=model.activation == "gelu_tanh",
        add_bias_linear=model.linear_bias,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        position_embedding_type="learned_absolute" if model.learned_positions else "rope",
        use_rotary_position_embeddings=not model.learned_positions,
        rotary_base=int(model.rotary_base) if model.rotary_base.is_integer() else model.rotary_base,
        rotary_percent=1.0,
        use_rope_scaling=is_llama3,
        rope_scaling_factor=scaling.factor if scaling and is_llama3 else None,
        rotary_seq_len_interpolation_factor=scaling.factor if scaling and is_linear else None,
        untie_embeddings_and_output_weights=not model.tie_embeddings,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        tensor_model_parallel_size=tp_size,
        pipeline_model_parallel_size=pp_size,
        iteration=0,
        transformer_impl="local",
        ckpt_format="torch",
    )
