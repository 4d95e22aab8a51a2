"""Reads a model from a llama.cpp GGUF file, dequantising its weights.

Knows GGUF's tensor names and llama.cpp's layouts; gguf_config.py knows what the metadata means.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from torch import Tensor

from checkpoints_tools.gguf_config import read_model
from checkpoints_tools.gguf_metadata import Metadata
from checkpoints_tools.gguf_tokenizer import save_gguf_tokenizer
from megatron_sps2.config import DType, ModelConfig
from megatron_sps2.model.weights import hf_shapes

_TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
}
_IN_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
# Dims 2i and 2i+1 of a query or key turn together, instead of i and i + d/2.
_PAIRS_TURN = ("llama", "smollm3")
# Hugging Face's GPT-2 has these as [in, out], GGUF as [out, in].
_IN_OUT = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def gguf_name(name: str) -> str:
    """Hugging Face name of a weight or bias of a served family -> GGUF tensor name."""
    layer = re.fullmatch(r"(?:model\.layers|transformer\.h)\.(\d+)\.(.+)\.(weight|bias)", name)
    if layer:
        return f"blk.{layer[1]}.{_IN_LAYER[layer[2]]}.{layer[3]}"
    stem, _, kind = name.rpartition(".")
    return f"{_TOP[stem]}.{kind}"


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
        reader = _open(path)
        self._metadata = Metadata(path, reader.fields)
        tensors = {tensor.name: tensor for tensor in reader.tensors}
        # Of other architectures llama.cpp reads no such tensor: it is then unexpected.
        divisors = tensors.pop("rope_freqs.weight", None) if self._metadata.architecture == "llama" else None
        self.model = read_model(
            self._metadata,
            {name: _shape(tensor) for name, tensor in tensors.items()},
            None if divisors is None else self._dequantised(divisors),
        )
        hf_names = {gguf_name(name): name for name in hf_shapes(self.model)}
        self._tensors = {hf_names.get(name, name): tensor for name, tensor in tensors.items()}

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {
            name: _shape(tensor)[::-1] if name.endswith(_IN_OUT) else _shape(tensor)
            for name, tensor in self._tensors.items()
        }

    def fetch(self, name: str) -> Tensor:
        """Raises ValueError naming a weight that is quantised in a way that is not read."""
        weight = self._dequantised(self._tensors[name])
        if name.endswith(_IN_OUT):
            return weight.T.contiguous()
        turned = self._metadata.architecture in _PAIRS_TURN
        return turned_to_hf(name, weight, self.model) if turned else weight

    def save_tokenizer(self, folder: Path) -> None:
        save_gguf_tokenizer(self._metadata, folder)

    def _dequantised(self, tensor: ReaderTensor) -> Tensor:
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError as error:
            raise ValueError(f"{self.path}: {tensor.name} cannot be read: {error}") from error
        return torch.from_numpy(np.array(values, dtype=np.float32))


def _shape(tensor: ReaderTensor) -> tuple[int, ...]:
    """GGUF writes the dimension that lies closest together first."""
    return tuple(int(n) for n in reversed(tensor.shape))


def _open(path: Path) -> GGUFReader:
    """Raises ValueError naming the file when it is not a GGUF file or ends too early."""
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ValueError(
            f"{path} ({path.stat().st_size} bytes) cannot be read as GGUF: {error}; fetch the file again"
        ) from error
    return reader
