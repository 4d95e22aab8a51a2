"""Every check of the configuration, with a message that names value, rule and fix."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from megatron_sps2.config import (
    AttentionConfig,
    CacheConfig,
    ModelConfig,
    ParallelConfig,
    SamplingParams,
    divisors,
)

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=72,
    ffn_hidden_size=96,
    num_attention_heads=9,
    num_query_groups=3,
    head_dim=8,
    vocab_size=100,
    max_seq_len=64,
)
COUNTS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"),
    *("num_query_groups", "head_dim", "vocab_size", "max_seq_len"),
)


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", [0, -3])
def test_a_model_has_at_least_one_of_everything(name: str, value: int) -> None:
    with pytest.raises(ValueError, match=rf"^{name}={value} must be at least 1"):
        replace(MODEL, **{name: value})


def test_every_kv_head_must_serve_the_same_number_of_queries() -> None:
    with pytest.raises(ValueError, match=r"num_attention_heads=9 .* num_query_groups=2; .* use \[1, 3, 9\]$"):
        replace(MODEL, num_query_groups=2)
    assert MODEL.queries_per_group == 3


@pytest.mark.parametrize("name", ["norm_epsilon", "rotary_base"])
def test_norm_and_rotary_constants_are_above_zero(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0.0 must be above 0"):
        replace(MODEL, **{name: 0.0})


def test_an_odd_head_dim_has_no_rotary_positions() -> None:
    with pytest.raises(ValueError, match="head_dim=7 is odd; rotary positions need an even head_dim"):
        replace(MODEL, head_dim=7)


@pytest.mark.parametrize("name", ["dp_size", "sp_size", "tp_size"])
def test_every_axis_has_at_least_one_rank(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}=0 must be at least 1"):
        ParallelConfig(**{name: 0})


def test_world_size_is_the_product_of_the_axes() -> None:
    assert ParallelConfig(dp_size=2, sp_size=3, tp_size=5).world_size == 30


@pytest.mark.parametrize(
    ("changes", "tp_size", "fits"),
    [
        ({}, 2, "1 or 3"),
        ({}, 9, "1 or 3"),
        ({"num_attention_heads": 8, "num_query_groups": 4}, 3, "1 or 2 or 4"),
        ({"num_attention_heads": 8, "num_query_groups": 2}, 4, "1 or 2"),
        ({"ffn_hidden_size": 50}, 3, "1"),
    ],
)
def test_a_tp_size_that_does_not_cut_the_model_is_refused_with_those_that_do(
    changes: dict[str, int], tp_size: int, fits: str
) -> None:
    with pytest.raises(ValueError, match=rf"^tp_size={tp_size} does not divide .*use --tp {fits} and spread"):
        ParallelConfig(tp_size=tp_size).check_model(replace(MODEL, **changes))


def test_any_sp_size_fits_any_model() -> None:
    for sp_size in (2, 4, 7, 100):
        ParallelConfig(sp_size=sp_size, tp_size=3).check_model(MODEL)


def test_an_unknown_strategy_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="^strategy='ring' is not known; use one of auto, ulysses, pass_kv, pass_q$"
    ):
        AttentionConfig(strategy="ring")  # type: ignore[arg-type]
    assert AttentionConfig(strategy="pass_q", pipeline=False).strategy == "pass_q"


@pytest.mark.parametrize("name", ["num_blocks", "block_size"])
def test_a_cache_has_at_least_one_slot(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}=0 must be at least 1"):
        CacheConfig(**{"num_blocks": 2, name: 0})
    assert CacheConfig(num_blocks=3, block_size=5).tokens_per_rank == 15


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_tokens": 0}, "max_tokens=0 must be at least 1"),
        ({"min_tokens": -1}, "min_tokens=-1 must be between 0 and 64"),
        ({"min_tokens": 4, "max_tokens": 3}, "min_tokens=4 must be between 0 and 3"),
        ({"temperature": -0.1}, r"temperature=-0\.1 must be 0 \(greedy\) or above"),
        ({"temperature": math.nan}, r"temperature=nan must be 0 \(greedy\) or above, and finite$"),
        ({"temperature": math.inf}, r"temperature=inf must be 0 \(greedy\) or above, and finite$"),
        ({"temperature": -math.inf}, r"temperature=-inf must be 0 \(greedy\) or above, and finite$"),
        ({"top_k": -1}, r"top_k=-1 must be 0 \(all tokens\) or above"),
        ({"top_p": 0.0}, r"top_p=0\.0 must be above 0 and at most 1"),
        ({"top_p": 1.1}, r"top_p=1\.1 must be above 0 and at most 1"),
        ({"top_p": math.nan}, "top_p=nan must be above 0 and at most 1"),
        ({"top_p": math.inf}, "top_p=inf must be above 0 and at most 1"),
        ({"min_p": math.nan}, "min_p=nan must be between 0 and 1"),
        ({"min_p": math.inf}, "min_p=inf must be between 0 and 1"),
        ({"min_p": -0.1}, r"min_p=-0\.1 must be between 0 and 1"),
        ({"min_p": 1.1}, r"min_p=1\.1 must be between 0 and 1"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty=0\.0 must be above 0 and finite; 1 is off"),
        ({"repetition_penalty": math.nan}, "repetition_penalty=nan must be above 0 and finite; 1 is off"),
        ({"repetition_penalty": math.inf}, "repetition_penalty=inf must be above 0 and finite; 1 is off"),
        ({"logprobs": -1}, "logprobs=-1 must be between 0 and 20"),
        ({"logprobs": 21}, "logprobs=21 must be between 0 and 20"),
        ({"stop": ("a", "")}, "stop contains an empty string; .* end every answer at once"),
    ],
)
def test_a_sampling_value_out_of_range_is_refused_by_name(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        SamplingParams(**values)


def test_sampling_values_at_their_ends_are_taken() -> None:
    SamplingParams(max_tokens=3, min_tokens=3, temperature=0, top_p=1, min_p=1, logprobs=0)
    SamplingParams(max_tokens=1, min_p=0, logprobs=20, stop=("x",), top_k=0)


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        MODEL.num_layers = 3  # type: ignore[misc]


def test_divisors_are_common_to_all() -> None:
    assert divisors(12, 8) == [1, 2, 4]
    assert divisors(7) == [1, 7]
