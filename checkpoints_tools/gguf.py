"""Reads a Llama model from a llama.cpp GGUF file, dequantising its weights.

Knows GGUF's metadata and tensor names and llama.cpp's order of q and k rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor

from megatron_sps2.config import DType, ModelConfig

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_name(name: str) -> str:
    """GGUF tensor name -> Hugging Face name; a name of no Llama weight comes back as it is."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
    if layer and layer[2] in _IN_LAYER:
        return f"model.layers.{layer[1]}.{_IN_LAYER[layer[2]]}.weight"
    return _TOP.get(name, name)


def rows_to_hf(weight: Tensor, num_heads: int) -> Tensor:
    """q or k weight [n*d, h]: llama.cpp's rows, where dims 2i and 2i+1 turn together -> i and i + d/2."""
    rows, width = weight.shape
    return weight.view(num_heads, rows // num_heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def turned_to_hf(name: str, weight: Tensor, model: ModelConfig) -> Tensor:
    """A weight by its Hugging Face name; q and k in Hugging Face's order of rows."""
    heads = {"q_proj.weight": model.num_attention_heads, "k_proj.weight": model.num_query_groups}
    num_heads = next((count for end, count in heads.items() if name.endswith(end)), None)
    return weight if num_heads is None else rows_to_hf(weight, num_heads)


class GgufSource:
    """A .gguf file, memory-mapped; each weight is dequantised to fp32 when it is asked for."""

    dtype: DType = "float32"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader = _open(path)
        self._tensors = {hf_name(tensor.name): tensor for tensor in self._reader.tensors}
        self.model = self._model_config()

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        # GGUF writes the dimension that lies closest together first.
        return {name: tuple(int(n) for n in reversed(t.shape)) for name, t in self._tensors.items()}

    def fetch(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        return turned_to_hf(name, weight, self.model)

    def save_tokenizer(self, folder: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)
        template = self._optional("tokenizer.chat_template")
        if template:
            # transformers reads everything from the file but this.
            tokenizer.chat_template = template
        tokenizer.save_pretrained(folder)

    def _optional(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        return default if field is None else field.contents()

    def _required(self, key: str) -> Any:
        value = self._optional(key)
        if value is None:
            raise ValueError(f"{self.path} has no metadata {key!r}, which a Llama model needs")
        return value

    def _check_architecture(self) -> None:
        architecture = self._required("general.architecture")
        if architecture != "llama":
            raise ValueError(f"{self.path}: architecture {architecture!r} is not supported; only 'llama' is")
        if self._optional("llama.expert_count", 0):
            raise ValueError(
                f"{self.path}: llama.expert_count is not 0; mixtures of experts are not supported"
            )

    def _check_positions(self, head_dim: int) -> None:
        scaling = self._optional("llama.rope.scaling.type", "none")
        if scaling != "none" or "rope_freqs.weight" in self._tensors:
            raise ValueError(
                f"{self.path}: scaled positions are not supported "
                f"(llama.rope.scaling.type={scaling!r}, or a tensor rope_freqs.weight)"
            )
        rotated = self._optional("llama.rope.dimension_count", head_dim)
        if rotated != head_dim:
            raise ValueError(
                f"{self.path}: llama.rope.dimension_count={rotated} is not supported; "
                f"it must be head_dim={head_dim}"
            )

    def _model_config(self) -> ModelConfig:
        self._check_architecture()
        hidden, heads = (
            int(self._required(f"llama.{k}")) for k in ("embedding_length", "attention.head_count")
        )
        head_dim = int(self._optional("llama.attention.key_length", hidden // heads))
        self._check_positions(head_dim)
        embedding = self._tensors.get("model.embed_tokens.weight")
        eos = self._optional("tokenizer.ggml.eos_token_id")
        return ModelConfig(
            num_layers=int(self._required("llama.block_count")),
            hidden_size=hidden,
            ffn_hidden_size=int(self._required("llama.feed_forward_length")),
            num_attention_heads=heads,
            num_query_groups=int(self._optional("llama.attention.head_count_kv", heads)),
            head_dim=head_dim,
            vocab_size=int(
                embedding.shape[1] if embedding is not None else self._required("llama.vocab_size")
            ),
            max_seq_len=int(self._required("llama.context_length")),
            norm_epsilon=_as_written(self._required("llama.attention.layer_norm_rms_epsilon")),
            rotary_base=float(self._optional("llama.rope.freq_base", 10000.0)),
            tie_embeddings="lm_head.weight" not in self._tensors,
            bos_token_id=self._optional("tokenizer.ggml.bos_token_id"),
            eos_token_ids=() if eos is None else (int(eos),),
        )


def _as_written(value: float) -> float:
    """An fp32 number of the file -> the decimal it was written from (9.99999974e-06 -> 1e-05)."""
    return float(str(np.float32(value)))


def _open(path: Path) -> GGUFReader:
    """Raises ValueError naming the file when it is not a GGUF file or ends too early."""
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as GGUF: {error}; fetch the file again"
        ) from error
    return reader
