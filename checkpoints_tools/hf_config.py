"""ModelConfig -> Hugging Face's config.json: families.model_config's inverse. Knows no file."""

from __future__ import annotations

from typing import Any

from checkpoints_tools import gemma, gpt2
from checkpoints_tools.positions import FULL, SLIDING
from megatron_sps2.config import DType, ModelConfig, RopeScaling

# By qkv_bias, qk_norm, no_rope_layers, num_experts, is_gemma.
KINDS = {
    (False, False, False, False, False): ("llama", "LlamaForCausalLM"),
    (True, False, False, False, False): ("qwen2", "Qwen2ForCausalLM"),
    (False, True, False, False, False): ("qwen3", "Qwen3ForCausalLM"),
    (False, False, True, False, False): ("smollm3", "SmolLM3ForCausalLM"),
    (False, False, False, True, False): ("mixtral", "MixtralForCausalLM"),
    (False, True, False, True, False): ("qwen3_moe", "Qwen3MoeForCausalLM"),
    (False, True, False, False, True): ("gemma3_text", "Gemma3ForCausalLM"),
}
# Whose layers all have the window, or none.
ONE_WINDOW = ("mixtral", "qwen3_moe")


def hf_config(model: ModelConfig, dtype: DType) -> dict[str, Any]:
    """config.json of a model, as the family that computes the same: model_config's inverse.

    A Mistral without windows, a Yi or Phi-3 model comes back as the Llama that it is.
    """
    if model.learned_positions:
        return gpt2.gpt2_config(model, dtype)
    kind, architecture = _kind(model)
    rope = _rope_entry(model.rope_scaling)
    config = {
        "architectures": [architecture],
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
        "rope_scaling": rope,
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
    if model.window_layers:
        types = [SLIDING if layer in model.window_layers else FULL for layer in range(model.num_layers)]
        config |= {"sliding_window": model.window, "use_sliding_window": True}
        config |= {} if kind in ONE_WINDOW else {"layer_types": types}
    if model.is_gemma:
        del config["hidden_act"]
        config |= gemma.gemma_config(model, rope)
    if kind == "smollm3":
        turns = [int(layer not in model.no_rope_layers) for layer in range(model.num_layers)]
        config |= {"no_rope_layers": turns, "pad_token_id": None}
    return config


def _kind(model: ModelConfig) -> tuple[str, str]:
    """model_type and transformers' class. Raises ValueError for a mixture that no family has."""
    switches = (model.qkv_bias, model.qk_norm, bool(model.no_rope_layers), bool(model.num_experts))
    kind, name = KINDS.get((*switches, model.is_gemma), ("", ""))
    is_all = model.window_layers == tuple(range(model.num_layers))
    if kind == "llama" and is_all:
        return "mistral", "MistralForCausalLM"
    has_its_windows = not model.window_layers or (is_all if kind in ONE_WINDOW else kind != "llama")
    if not kind or not has_its_windows:
        raise ValueError(
            f"no family has qkv_bias={model.qkv_bias}, qk_norm={model.qk_norm}, no_rope_layers="
            f"{model.no_rope_layers}, num_experts={model.num_experts} and window_layers={model.window_layers}"
            " together; write a Megatron checkpoint instead"
        )
    return kind, name


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
