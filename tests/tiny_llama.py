"""Small random Llama models made by transformers, and a plain core attention to run ours with.

The reference of the model and checkpoint tests: transformers computes, we must agree.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_sps2.config import ParallelConfig
from megatron_sps2.model.checkpoint import load_gpt
from megatron_sps2.model.gpt import GptForward
from megatron_sps2.parallel.groups import ParallelGroups

if TYPE_CHECKING:  # ranks import this module too, and need no transformers
    from transformers import LlamaConfig, LlamaForCausalLM

# (query heads, KV heads): MHA, GQA with 4 and 3 queries per KV head, MHA that divides by 2 and 3.
HEADS = {"mha-4": (4, 4), "gqa-8-2": (8, 2), "gqa-9-3": (9, 3), "mha-6": (6, 6)}
# 251 is prime: with tp 2 and 3 the vocabulary must be padded.
VOCAB_SIZE = 251


def hf_config(num_heads: int, num_kv_heads: int, **changes: Any) -> LlamaConfig:
    """A 2-layer Llama with head_dim 8; ffn divides by 2 and 3."""
    from transformers import LlamaConfig

    values = {
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "hidden_size": 8 * num_heads,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "tie_word_embeddings": False,
        # Far from 0, so that a wrong layout shows in the logits.
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaConfig(**{**values, **changes})


def save_hf_llama(
    folder: Path, num_heads: int, num_kv_heads: int, *, shard_size: str = "1GB", **changes: Any
) -> LlamaForCausalLM:
    """Writes a random model as a Hugging Face folder and returns it in eval mode."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(num_heads * 100 + num_kv_heads)
    hf = LlamaForCausalLM(hf_config(num_heads, num_kv_heads, **changes)).eval()
    for name, weight in hf.named_parameters():
        if "norm" in name:
            nn.init.uniform_(weight, 0.5, 1.5)  # all ones would hide swapped norms
    hf.save_pretrained(folder, max_shard_size=shard_size)
    return hf


def prompt(num_tokens: int, seed: int = 0) -> Tensor:
    """[num_tokens] token ids."""
    return torch.randint(VOCAB_SIZE, (num_tokens,), generator=torch.Generator().manual_seed(seed))


class PlainAttention(nn.Module):
    """Causal SDPA in Megatron's core attention slot, on the tokens at hand."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Tensor:
        """q [s, b, n, d], k and v [s, b, n_kv, d] -> [s, b, n*d]."""
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)


def load_plain(folder: Path, dtype: torch.dtype = torch.float32) -> GptForward:
    """The checkpoint over the whole world as tp ranks, with PlainAttention."""
    groups = ParallelGroups.create(ParallelConfig(tp_size=torch.distributed.get_world_size()))
    return load_gpt(folder, groups.to_megatron(), PlainAttention, dtype)


def forward(gpt: GptForward, token_ids: Tensor) -> Tensor:
    """[s] token ids at positions 0, 1, ... -> logits [s, v]."""
    positions = torch.arange(len(token_ids))
    hidden, angles = gpt.embed(token_ids[:, None], positions), gpt.angles(positions)
    for index in range(gpt.num_layers):
        hidden = gpt.layer(index, hidden, gpt.angles_of(index, angles))
    return gpt.logits(hidden)[:, 0]
