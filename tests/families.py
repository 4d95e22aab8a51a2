"""A small random model of each served family, made by transformers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.tiny_llama import VOCAB_SIZE

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 256}
LINEAR = {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 5000.0, "factor": 4.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class FamilyModel:
    """A family's model_type and config, and the grids (tp, sp) that fit its heads."""

    model_type: str
    heads: tuple[int, int] = (8, 2)
    grids: tuple[tuple[int, int], ...] = ((1, 1), (1, 2), (2, 1), (2, 2), (1, 3))
    changes: Mapping[str, Any] = field(default_factory=dict)

    def config(self) -> Any:
        num_heads, num_kv_heads = self.heads
        values = {
            "num_attention_heads": num_heads,
            "num_key_value_heads": num_kv_heads,
            "head_dim": 8,
            "hidden_size": 8 * num_heads,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "vocab_size": VOCAB_SIZE,
            "max_position_embeddings": 1024,
            # Far from 0, so that a wrong layout shows in the logits.
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        if self.model_type == "gpt2":  # has neither, and other names for the rest
            for name in ("num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings"):
                del values[name]
        return AutoConfig.for_model(self.model_type, **{**values, **self.changes})


FAMILY_MODELS = {
    "llama2": FamilyModel(model_type="llama", heads=(8, 8)),
    "llama3": FamilyModel(model_type="llama", changes={"rope_parameters": LLAMA3}),
    "llama-linear": FamilyModel(model_type="llama", changes={"rope_parameters": LINEAR}),
    "llama-dynamic": FamilyModel(model_type="llama", changes={"rope_parameters": DYNAMIC}),
    "mistral": FamilyModel(model_type="mistral", changes={"sliding_window": None}),
    "mistral-window": FamilyModel(model_type="mistral", changes={"sliding_window": 130}),
    "gemma3": FamilyModel(
        model_type="gemma3_text",
        changes={
            "num_hidden_layers": 3,
            "head_dim": 16,
            "query_pre_attn_scalar": 24,
            "sliding_window": 70,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5000.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            },
        },
    ),
    "mixtral": FamilyModel(
        model_type="mixtral",
        changes={"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "phi3": FamilyModel(model_type="phi3", changes={"sliding_window": 200}),
    "qwen2": FamilyModel(model_type="qwen2", changes={"tie_word_embeddings": True}),
    "qwen2-yarn": FamilyModel(model_type="qwen2", changes={"rope_parameters": YARN}),
    "qwen3": FamilyModel(model_type="qwen3", changes={"head_dim": 16}),
    "qwen3-window": FamilyModel(
        model_type="qwen3",
        changes={"head_dim": 16, "use_sliding_window": True, "sliding_window": 50, "max_window_layers": 1},
    ),
    "qwen3-moe": FamilyModel(
        model_type="qwen3_moe",
        changes={
            "head_dim": 16,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 48,
            "norm_topk_prob": False,
        },
    ),
    "smollm3": FamilyModel(model_type="smollm3", changes={"num_hidden_layers": 5}),
    "gpt2": FamilyModel(
        model_type="gpt2",
        heads=(8, 8),
        changes={"n_positions": 1024, "n_inner": 96, "activation_function": "gelu_new"},
    ),
    "smollm2": FamilyModel(
        model_type="llama",
        heads=(9, 3),
        grids=((1, 1), (1, 2), (1, 3), (3, 1)),
        changes={"tie_word_embeddings": True},
    ),
}


def save_family(name: str, folder: Path, **changes: Any) -> PreTrainedModel:
    """Writes the random model as a Hugging Face folder and returns it in eval mode."""
    torch.manual_seed(sum(map(ord, name)))
    family = FAMILY_MODELS[name]
    config = replace(family, changes={**family.changes, **changes}).config()
    hf = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for weight_name, weight in hf.named_parameters():
        if ("norm" in weight_name or ".ln_" in weight_name) and weight_name.endswith("weight"):
            nn.init.uniform_(weight, 0.5, 1.5)  # all ones would hide swapped norms
        elif weight_name.endswith("bias"):
            nn.init.normal_(weight, std=0.5)  # zeros would hide a forgotten bias
    hf.save_pretrained(folder)
    return hf
