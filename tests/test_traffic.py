"""The formulas against the table of the method: bytes sent per rank and layer, bf16, 128K tokens, 8 ranks."""

from __future__ import annotations

import pytest

from megatron_sps2.config import ModelConfig, ParallelConfig
from megatron_sps2.parallel.traffic import Traffic

NUM_TOKENS = 128 * 1024


def traffic(num_heads: int, *, sp_size: int = 1, tp_size: int = 1) -> Traffic:
    model = ModelConfig(
        num_layers=1,
        hidden_size=128 * num_heads,
        ffn_hidden_size=64,
        num_attention_heads=num_heads,
        num_query_groups=8,
        head_dim=128,
        vocab_size=1,
        max_seq_len=NUM_TOKENS,
    )
    return Traffic(model=model, parallel=ParallelConfig(sp_size=sp_size, tp_size=tp_size), element_size=2)


@pytest.mark.parametrize(
    ("num_heads", "tp", "ulysses", "pass_kv", "pass_q"),
    [(32, 3758, 294, 470, 1894), (64, 7516, 528, 470, 3787)],
)
def test_prefill_equals_the_table(num_heads: int, tp: int, ulysses: int, pass_kv: int, pass_q: int) -> None:
    spread = traffic(num_heads, sp_size=8)
    assert round(traffic(num_heads, tp_size=8).tp_all_reduce(NUM_TOKENS) / 1e6) == tp
    assert round(spread.ulysses(NUM_TOKENS) / 1e6) == ulysses
    assert round(spread.pass_kv(NUM_TOKENS) / 1e6) == pass_kv
    assert round(spread.pass_q(NUM_TOKENS) / 1e6) == pass_q


def test_one_decoded_token_costs_what_the_method_says() -> None:
    spread = traffic(32, sp_size=8)
    assert round(spread.decode(1) / 1e3, 1) == 14.4
    assert round(traffic(32, tp_size=8).tp_all_reduce(1) / 1e3, 1) == 28.7
    assert round(spread.pass_kv(NUM_TOKENS) / 1e6) == 470, "moving KV instead"


def test_one_rank_sends_nothing() -> None:
    alone = traffic(32)
    assert alone.ulysses(100) == alone.pass_kv(100) == alone.pass_q(100) == alone.decode(5) == 0
    assert alone.tp_all_reduce(100) == 0


def test_tp_divides_what_each_rank_sends() -> None:
    whole, half = traffic(32, sp_size=4), traffic(32, sp_size=4, tp_size=2)
    for name in ("ulysses", "pass_kv", "pass_q", "decode", "moved_kv"):
        assert getattr(half, name)(64) == getattr(whole, name)(64) / 2
    # Each tp group reduces its own S/P tokens.
    assert half.tp_all_reduce(64) == 4 * 4096 * 16 * 2 / 2


def test_moved_kv_is_one_row_of_k_and_v_a_token() -> None:
    assert traffic(32, sp_size=2).moved_kv(3) == 3 * 2 * 8 * 128 * 2
