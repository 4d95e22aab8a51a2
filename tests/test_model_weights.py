"""Weight rules between Hugging Face and Megatron names."""

from __future__ import annotations

import torch

from megatron_sps2.config import ModelConfig
from megatron_sps2.model.weights import hf_shapes, join_qkv, to_hf, to_megatron

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=12,
    ffn_hidden_size=10,
    num_attention_heads=6,
    num_query_groups=2,
    head_dim=4,
    vocab_size=7,
    max_seq_len=16,
)


def test_qkv_holds_for_each_kv_head_its_queries_then_its_key_then_its_value() -> None:
    def rows(first: int, heads: int) -> torch.Tensor:
        """[heads*d, 1]: every row holds the number of its head."""
        return torch.arange(first, first + heads).repeat_interleave(4)[:, None]

    joined = join_qkv(MODEL, rows(0, 6), rows(10, 2), rows(20, 2))
    assert joined[::4, 0].tolist() == [0, 1, 2, 10, 20, 3, 4, 5, 11, 21]


def test_there_and_back_gives_every_weight_unchanged() -> None:
    torch.manual_seed(0)
    weights = {name: torch.randn(shape) for name, shape in hf_shapes(MODEL).items()}
    megatron = dict(to_megatron(MODEL, weights.__getitem__))
    back = dict(to_hf(MODEL, megatron.__getitem__))
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) for name in weights)


def test_a_tied_model_has_no_output_weight() -> None:
    tied = ModelConfig(
        **{name: getattr(MODEL, name) for name in MODEL.__dataclass_fields__} | {"tie_embeddings": True}
    )
    assert hf_shapes(MODEL).keys() - hf_shapes(tied).keys() == {"lm_head.weight"}
