"""A request's end: which token is the last one, and which prompts are refused at once."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sps2.config import ModelConfig, SamplingParams
from megatron_sps2.engine.request import FinishReason, Request, check_request
from megatron_sps2.engine.sampler import SampledToken

EOS = 2
MODEL = ModelConfig(
    num_layers=1,
    hidden_size=8,
    ffn_hidden_size=8,
    num_attention_heads=1,
    num_query_groups=1,
    head_dim=8,
    vocab_size=50,
    max_seq_len=32,
    eos_token_ids=(EOS,),
)
EVERY_ID_BUT_EOS = tuple(i for i in range(50) if i != EOS)


def make(num_prompt: int = 3, num_past: int = 0, **params: Any) -> Request:
    return Request(
        request_id=0,
        prompt_ids=tuple(range(num_prompt)),
        params=SamplingParams(**params),
        num_past=num_past,
    )


def take(request: Request, *token_ids: int) -> FinishReason | None:
    for token_id in token_ids:
        assert request.finish_reason is None, "a token came after the end"
        request.take(SampledToken(token_id), (EOS,))
    return request.finish_reason


@pytest.mark.parametrize(
    ("params", "token_ids", "reason"),
    [
        ({"max_tokens": 3}, (7, 7), None),
        ({"max_tokens": 3}, (7, 7, 7), FinishReason.LENGTH),
        ({"max_tokens": 3}, (7, EOS), FinishReason.STOP),
        ({"max_tokens": 3}, (7, 7, EOS), FinishReason.STOP),
        ({"max_tokens": 2, "ignore_eos": True}, (EOS, EOS), FinishReason.LENGTH),
        ({"max_tokens": 9, "stop_token_ids": (5, 6)}, (7, 6), FinishReason.STOP),
        ({"max_tokens": 9, "stop_token_ids": (5,), "ignore_eos": True}, (EOS, 5), FinishReason.STOP),
        ({"max_tokens": 9, "min_tokens": 2}, (EOS, EOS), None),
        ({"max_tokens": 9, "min_tokens": 2}, (7, 7, EOS), FinishReason.STOP),
    ],
)
def test_an_answer_ends_where_its_parameters_say(
    params: dict[str, Any], token_ids: tuple[int, ...], reason: FinishReason | None
) -> None:
    assert take(make(**params), *token_ids) is reason


def test_poisoned_logits_end_the_request_and_keep_its_tokens() -> None:
    request = make()
    take(request, 7, 8)
    request.take(None, (EOS,))
    assert (request.finish_reason, request.output_ids) == (FinishReason.ERROR, [7, 8])
    assert len(request.token_times) == 2


def test_lengths_count_past_prompt_and_answer() -> None:
    request = make(num_prompt=3, num_past=10)
    take(request, 7, 8)
    assert (request.num_prompt_tokens, request.num_tokens) == (13, 15)


@pytest.mark.parametrize(
    ("request_", "max_model_len", "message"),
    [
        (make(0), 32, r"^the prompt is empty \(0 tokens\); give at least one token"),
        (make(51), 32, "token id 50 at position 50 is unknown; use integers from 0 to 49"),
        (make(stop_token_ids=(3, 50)), 32, "token id 50 at position 1"),
        (
            make(max_tokens=9, min_tokens=1, stop_token_ids=EVERY_ID_BUT_EOS),
            32,
            "^min_tokens=1 forbids eos and stop_token_ids, together all 50 tokens .*; use min_tokens=0 or",
        ),
        (
            make(23, max_tokens=10),
            64,
            r"prompt of 23 tokens \+ max_tokens=10 = 33 exceeds 32 \(max_seq_len of the model\); shorten",
        ),
        (make(11, max_tokens=10), 20, r"= 21 exceeds 20 \(--max-model-len\); .* lower --max-tokens"),
        (make(3, num_past=20, max_tokens=10), 32, r"prompt of 23 tokens \+ max_tokens=10 = 33 exceeds 32"),
    ],
)
def test_what_cannot_be_served_is_refused(request_: Request, max_model_len: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_request(request_, MODEL, max_model_len)


def test_a_prompt_that_just_fits_is_taken() -> None:
    check_request(make(22, max_tokens=10), MODEL, 64)
    check_request(make(10, max_tokens=10), MODEL, 20)


@pytest.mark.parametrize(
    ("min_tokens", "stop_token_ids"),
    [(0, EVERY_ID_BUT_EOS), (1, EVERY_ID_BUT_EOS[1:]), (1, (3,) * 100)],
)
def test_min_tokens_needs_one_id_that_does_not_end_the_answer(
    min_tokens: int, stop_token_ids: tuple[int, ...]
) -> None:
    check_request(make(max_tokens=9, min_tokens=min_tokens, stop_token_ids=stop_token_ids), MODEL, 32)
