"""Reads the .bin files of llama2.c (version 0 and 1, fp32): a header of integers, then all weights in a row.

Knows the order of the file and that dims 2i and 2i+1 of a head turn together.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from checkpoints_tools.gguf import turned_to_hf
from checkpoints_tools.tokenizer_files import save_sentencepiece
from megatron_sps2.config import DType, ModelConfig

logger = logging.getLogger(__name__)

MAGIC = 0x616B3432  # "ak42", from version 1 on
HEADER_BYTES = {0: 28, 1: 256}
FIELDS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")


class Llama2cSource:
    """A mapped file. A SentencePiece model beside it, the only *.model file there, is its tokenizer."""

    dtype: DType = "float32"

    def __init__(self, path: Path) -> None:
        self.path = path
        version, numbers, shared = _read_header(path)
        header = dict(zip(FIELDS, numbers, strict=True))
        self.model = _model_config(header, shared)
        self._places, end = _places(self.model, version)
        size = path.stat().st_size
        if size < HEADER_BYTES[version] + 4 * end:
            raise ValueError(
                f"{path} has {size} bytes, {HEADER_BYTES[version] + 4 * end} expected by its header "
                f"{header}: it is truncated, or no llama2.c file"
            )
        self._values = np.memmap(path, dtype="<f4", mode="r", offset=HEADER_BYTES[version])

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: shape for name, (_, shape) in self._places.items()}

    def fetch(self, name: str) -> Tensor:
        start, shape = self._places[name]
        values = np.array(self._values[start : start + int(np.prod(shape))], dtype=np.float32)
        return turned_to_hf(name, torch.from_numpy(values).view(shape), self.model)

    def save_tokenizer(self, folder: Path) -> None:
        found = sorted(self.path.parent.glob("*.model"))
        if len(found) == 1:
            save_sentencepiece(found[0], folder, {})
        else:
            logger.warning(
                "%s has %d *.model files beside it, not one; the checkpoint will take token ids only",
                *(self.path, len(found)),
            )


def is_llama2c(path: Path) -> bool:
    """By its name and a header that makes sense."""
    if path.suffix.lower() != ".bin" or path.stat().st_size < min(HEADER_BYTES.values()):
        return False
    try:
        _read_header(path)
    except ValueError:
        return False
    return True


def _read_header(path: Path) -> tuple[int, tuple[int, ...], bool]:
    """The version, the seven numbers, and whether the output layer is the embedding."""
    start = path.open("rb").read(40)
    (magic, version) = struct.unpack_from("<Ii", start)
    if magic == MAGIC:
        if version != 1:
            raise ValueError(f"{path} is of llama2.c's version {version}; 0 and 1 (fp32) are read")
        numbers, shared = struct.unpack_from("<7i", start, 8), bool(start[36])
    else:
        version, numbers = 0, struct.unpack_from("<7i", start)
        shared = numbers[5] > 0  # a negative vocabulary says that the output layer has its own weights
        numbers = (*numbers[:5], abs(numbers[5]), numbers[6])
    if not all(0 < number < 1 << 24 for number in numbers):
        raise ValueError(f"{path} begins with {numbers}, which are no sizes of a llama2.c model")
    return version, numbers, shared


def _model_config(header: Mapping[str, int], shared: bool) -> ModelConfig:
    return ModelConfig(
        num_layers=header["n_layers"],
        hidden_size=header["dim"],
        ffn_hidden_size=header["hidden_dim"],
        num_attention_heads=header["n_heads"],
        num_query_groups=header["n_kv_heads"],
        head_dim=header["dim"] // header["n_heads"],
        vocab_size=header["vocab_size"],
        max_seq_len=header["max_seq_len"],
        tie_embeddings=shared,
        bos_token_id=1,
        eos_token_ids=(2,),
    )


def _places(model: ModelConfig, version: int) -> tuple[dict[str, tuple[int, tuple[int, ...]]], int]:
    """Where each weight begins, in values, with its shape; and where all of them end."""
    places: dict[str, tuple[int, tuple[int, ...]]] = {}
    position = 0
    for name, shape in _order(model, version):
        if name:
            places[name] = position, shape
        position += int(np.prod(shape))
    return places, position


def _order(model: ModelConfig, version: int) -> Iterator[tuple[str | None, tuple[int, ...]]]:
    """The weights as they lie in the file; None for what follows from the config."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    q_size, kv_size = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
    layers = range(model.num_layers)
    kinds: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (q_size, hidden),
        "self_attn.k_proj": (kv_size, hidden),
        "self_attn.v_proj": (kv_size, hidden),
        "self_attn.o_proj": (hidden, q_size),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
        "mlp.up_proj": (ffn, hidden),
    }
    norms = ("input_layernorm", "post_attention_layernorm")
    matrices = [kind for kind in kinds if kind not in norms]
    embedding = "model.embed_tokens.weight", (model.vocab_size, hidden)
    final = "model.norm.weight", (hidden,)
    # Version 1 puts all norms first.
    parts = (
        [*norms, "model.norm", "model.embed_tokens", *matrices]
        if version
        else [*("model.embed_tokens", *kinds, "model.norm")]
    )
    for part in parts:
        if part in kinds:
            yield from ((f"model.layers.{layer}.{part}.weight", kinds[part]) for layer in layers)
        else:
            yield final if part == "model.norm" else embedding
    if version == 0:
        yield None, (2, model.max_seq_len, model.head_dim // 2)  # cosines and sines
    if not model.tie_embeddings:
        yield "lm_head.weight", (model.vocab_size, hidden)
