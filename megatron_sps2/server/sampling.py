"""From a request's body to token ids and SamplingParams; every rule that needs the model is checked here."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from megatron_sps2.config import SamplingParams
from megatron_sps2.engine.tokenizer import TOKENIZER_FILE, Tokenizer, check_ids
from megatron_sps2.server.errors import ApiError
from megatron_sps2.server.protocol import Ready
from megatron_sps2.server.schema import Sampling

T = TypeVar("T")
NEUTRAL = {"presence_penalty": 0.0, "frequency_penalty": 0.0}


def refuse(holds: object, message: str, param: str | None = None) -> None:
    """ApiError 400 where `holds`."""
    if holds:
        raise ApiError(400, message, param=param)


def users_mistake(make: Callable[[], T], param: str | None = None) -> T:
    """`make()`, a ValueError of which (or text that no tokenizer takes) is the user's: 400."""
    try:
        return make()
    except (ValueError, TypeError) as error:
        raise ApiError(400, str(error), param=param) from error


def check_model(name: str | None, served: str) -> None:
    """ApiError 404 for another model than the one that is served."""
    if name is not None and name != served:
        raise ApiError(
            404, f"model={name!r} is not served here; use {served!r}", param="model", code="model_not_found"
        )


def check_neutral(body: Sampling) -> None:
    """Refuses what would change the answer and is not supported."""
    for name, neutral in NEUTRAL.items():
        value = getattr(body, name)
        refuse(
            value != neutral, f"{name}={value} is not supported; leave it out or use repetition_penalty", name
        )
    refuse(body.logit_bias, "logit_bias is not supported; leave it out", "logit_bias")
    refuse(
        body.stream_options and not body.stream,
        "stream_options needs stream=true; leave it out",
        "stream_options",
    )


def as_prompts(prompt: Any, tokenizer: Tokenizer | None, limit: int) -> list[list[int]]:
    """Text, texts, ids or lists of ids -> ids of each prompt."""
    refuse(prompt in ("", []), "prompt is empty (0 tokens); give at least one token", "prompt")
    many = prompt if isinstance(prompt, list) and not isinstance(prompt[0], int) else [prompt]
    refuse(len(many) > limit, f"{len(many)} prompts exceed {limit}; send several requests", "prompt")
    return [encode(each, tokenizer) if isinstance(each, str) else list(each) for each in many]


def encode(text: str, tokenizer: Tokenizer | None) -> list[int]:
    """ApiError 400 where there is no tokenizer, or for text that is none (half a surrogate pair)."""
    if tokenizer is None:
        raise ApiError(400, f"the checkpoint has no {TOKENIZER_FILE}; send token ids instead of text")
    return users_mistake(lambda: tokenizer.encode(_valid(text)), "prompt")


def _valid(text: str) -> str:
    """Raises ValueError for half a surrogate pair."""
    text.encode()
    return text


def valid_texts(texts: Sequence[str], param: str) -> None:
    users_mistake(lambda: [_valid(text) for text in texts], param)


def check_length(ids: Sequence[int], max_tokens: int, ready: Ready) -> None:
    """Refuses unknown ids and what is longer than the server takes."""
    refuse(not ids, "the prompt is empty (0 tokens); give at least one token", "prompt")
    users_mistake(lambda: check_ids(ids, ready.vocab_size), "prompt")
    wanted = len(ids) + max_tokens
    refuse(
        wanted > ready.max_model_len,
        f"prompt of {len(ids)} tokens + max_tokens={max_tokens} = {wanted} exceeds {ready.max_model_len}, "
        "the longest here; shorten the prompt or lower max_tokens",
        "max_tokens",
    )


def make_params(body: Sampling, choice: int, seed: int, **more: Any) -> SamplingParams:
    """Of choice number `choice`; with one seed all choices are drawn apart."""
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    valid_texts(stop, "stop")
    return users_mistake(
        lambda: SamplingParams(
            temperature=body.temperature,
            top_k=max(0, body.top_k),
            top_p=body.top_p,
            min_p=body.min_p,
            repetition_penalty=body.repetition_penalty,
            seed=seed + choice,
            stop=tuple(stop),
            stop_token_ids=tuple(body.stop_token_ids or ()),
            ignore_eos=body.ignore_eos,
            min_tokens=body.min_tokens,
            **more,
        )
    )


def pick_seed(wanted: int | None) -> int:
    return secrets.randbits(62) if wanted is None else wanted
