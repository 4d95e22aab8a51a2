"""Writes a Hugging Face folder as GGUF, as llama.cpp's converter names, orders and turns it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from safetensors.torch import load_file
from torch import Tensor

Change = Callable[[GGUFWriter], None]

STEMS = {
    **{"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"},
    **{"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    **{f"self_attn.{x}_norm": f"attn_{x}_norm" for x in "qk"},
    **{"self_attn.o_proj": "attn_output"},
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
    **{"transformer.wte": "token_embd", "transformer.wpe": "position_embd"},
    **{"transformer.ln_f": "output_norm"},
    **{"ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output"},
    **{"ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
}


def write_gguf(
    path: Path,
    folder: Path,
    *,
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    change: Change = lambda writer: None,
    interleaved: bool = True,
) -> Path:
    """`change` sees the writer last; interleaved: q and k rows of Llama and SmolLM3 in llama.cpp's order."""
    config = json.loads((folder / "config.json").read_text())
    family = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    writer = GGUFWriter(path, family)
    (_add_gpt2 if family == "gpt2" else _add_llama)(writer, config)
    for name, weight in load_file(folder / "model.safetensors").items():
        if interleaved and family in ("llama", "smollm3"):
            weight = _turned(name, weight, config)
        if family == "gpt2" and name.endswith(("attn.weight", "proj.weight", "fc.weight")):
            weight = weight.T.contiguous()
        used = kind if weight.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(gguf_name(name), quantize(weight.numpy(), used), raw_dtype=used)
    change(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    stem, kind = name.rsplit(".", 1)
    parts = stem.split(".")
    if stem not in STEMS:
        return f"blk.{parts[2]}.{STEMS['.'.join(parts[3:])]}.{kind}"
    return f"{STEMS[stem]}.{kind}"


def interleave(weight: Tensor, num_heads: int) -> Tensor:
    """llama.cpp's order, told per row: half-dim i of a head becomes dims 2i and 2i+1."""
    half = weight.shape[0] // num_heads // 2
    rows = [
        head * 2 * half + i + side * half for head in range(num_heads) for i in range(half) for side in (0, 1)
    ]
    return weight[rows]


def rope_divisors(base: float, head_dim: int, rope: dict[str, Any]) -> np.ndarray:
    """rope_freqs.weight of a llama3 scaling, wave by wave."""
    found = []
    for pair in range(head_dim // 2):
        turns = rope["original_max_position_embeddings"] / (2 * math.pi * base ** (2 * pair / head_dim))
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        smooth = (turns - low) / (high - low)
        between = 1 / ((1 - smooth) / rope["factor"] + smooth)
        found.append(1.0 if turns > high else rope["factor"] if turns < low else between)
    return np.array(found, np.float32)


def _turned(name: str, weight: Tensor, config: dict[str, Any]) -> Tensor:
    heads = {"q_proj.weight": "num_attention_heads", "k_proj.weight": "num_key_value_heads"}
    count = next((config[key] for end, key in heads.items() if name.endswith(end)), None)
    return weight if count is None else interleave(weight, count)


def _add_llama(writer: GGUFWriter, config: dict[str, Any]) -> None:
    heads, rope = config["num_attention_heads"], config["rope_parameters"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_string(f"{writer.arch}.rope.scaling.type", rope["rope_type"])
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", rope_divisors(rope["rope_theta"], head_dim, rope))
    _add_ids(writer, config)


def _add_gpt2(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(config["n_inner"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    _add_ids(writer, config)


def _add_ids(writer: GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_file_type(0)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
