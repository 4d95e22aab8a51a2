"""POST /v1/chat/completions, as OpenAI has it: the model's template around messages, then as completions."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from megatron_sps2.engine.tokenizer import TOKENIZER_FILE
from megatron_sps2.server.completions import usage
from megatron_sps2.server.errors import ApiError
from megatron_sps2.server.generation import Ask, Generation
from megatron_sps2.server.protocol import Token
from megatron_sps2.server.sampling import (
    check_length,
    check_model,
    check_neutral,
    make_params,
    pick_seed,
    refuse,
    users_mistake,
    valid_texts,
)
from megatron_sps2.server.schema import ChatMessage, ChatRequest
from megatron_sps2.server.service import Service, answer_as_stream, answer_at_once, new_id


@dataclass(slots=True)
class _Plan:
    body: ChatRequest
    prompt_ids: list[int]
    asks: list[Ask]
    name: str = field(default_factory=lambda: new_id("chatcmpl"))
    created: int = field(default_factory=lambda: int(time.time()))


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.post("/v1/chat/completions", summary="Answer a conversation")
    async def chat(body: ChatRequest, request: Request) -> Response:
        plan = await asyncio.to_thread(_plan, service, body)  # a long text takes seconds
        generation = service.begin(body, plan.asks)
        if body.stream:
            return answer_as_stream(request, plan.name, _events(service, plan, generation))
        return await answer_at_once(request, plan.name, lambda: _whole(service, plan, generation))

    return routes


def encode_chat(service: Service, messages: Sequence[ChatMessage]) -> list[int]:
    """ApiError 400 where there is no tokenizer or template, or the template refuses."""
    if service.tokenizer is None:
        raise ApiError(400, f"the checkpoint has no {TOKENIZER_FILE}; send token ids to /v1/completions")
    plain, tokenizer = [message.as_message() for message in messages], service.tokenizer
    valid_texts([text for message in plain for text in message.values()], "messages")
    return users_mistake(lambda: tokenizer.encode_chat(plain), "messages")


def _plan(service: Service, body: ChatRequest) -> _Plan:
    ready = service.client.ready
    check_model(body.model, service.config.served_model_name)
    check_neutral(body)
    refuse(body.tools, "tools are not supported; leave them out", "tools")
    kind = body.response_format.type if body.response_format else "text"
    refuse(kind != "text", f"response_format={kind!r} is not supported; use 'text'", "response_format")
    refuse(
        body.top_logprobs is not None and not body.logprobs,
        f"top_logprobs={body.top_logprobs} needs logprobs=true",
        "top_logprobs",
    )
    ids = encode_chat(service, body.messages)
    wanted = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    refuse(wanted == 0, "max_tokens=0 gives no token; use 1 or more", "max_tokens")
    max_tokens = max(1, ready.max_model_len - len(ids)) if wanted is None else wanted
    check_length(ids, max_tokens, ready)
    seed, num_top = pick_seed(body.seed), (body.top_logprobs or 0) if body.logprobs else None
    asks = [
        Ask(prompt_ids=ids, params=make_params(body, i, seed, max_tokens=max_tokens, logprobs=num_top))
        for i in range(body.n)
    ]
    return _Plan(body, ids, asks)


def _logprobs(service: Service, tokens: Sequence[Token], num_top: int) -> dict[str, Any]:
    def one(token_id: int, logprob: float | None) -> dict[str, Any]:
        text = service.token_text(token_id)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}

    return {
        "content": [
            one(each.token_id, each.logprob)
            | {"top_logprobs": [one(*pair) for pair in each.top_logprobs[:num_top]]}
            for each in tokens
        ]
    }


def _head(service: Service, plan: _Plan, kind: str) -> dict[str, Any]:
    name = service.config.served_model_name
    return {"id": plan.name, "object": kind, "created": plan.created, "model": name}


async def _events(
    service: Service, plan: _Plan, generation: Generation
) -> AsyncGenerator[dict[str, Any], None]:
    head = _head(service, plan, "chat.completion.chunk")

    def chunk(index: int, delta: dict[str, Any], **more: Any) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, **more}
        return {**head, "choices": [choice]}

    for index in range(plan.body.n):
        yield chunk(index, {"role": "assistant", "content": ""})
    async with contextlib.aclosing(service.pieces(plan.name, generation)) as pieces:
        async for piece in pieces:
            scores = None
            if plan.body.logprobs:
                scores = _logprobs(service, piece.tokens, plan.body.top_logprobs or 0)
            if piece.text or piece.finish_reason or (scores and piece.tokens):
                delta = {"content": piece.text} if piece.text else {}
                extras = {"timings": piece.timings, "csa": piece.csa}
                event = chunk(piece.index, delta, logprobs=scores, finish_reason=piece.finish_reason)
                yield event | {key: value for key, value in extras.items() if value}
    if plan.body.stream_options and plan.body.stream_options.include_usage:
        counts = usage(len(plan.prompt_ids), generation)
        yield {**head, "choices": [], "usage": counts}


async def _whole(service: Service, plan: _Plan, generation: Generation) -> dict[str, Any]:
    texts, reasons = [""] * plan.body.n, [""] * plan.body.n
    tokens: list[list[Token]] = [[] for _ in range(plan.body.n)]
    extras: dict[str, Any] = {}
    async with contextlib.aclosing(service.pieces(plan.name, generation)) as pieces:
        async for piece in pieces:
            texts[piece.index] += piece.text
            tokens[piece.index] += piece.tokens
            reasons[piece.index] = piece.finish_reason or ""
            found = {"timings": piece.timings, "csa": piece.csa}
            extras.update({key: value for key, value in found.items() if value})
    num_top = plan.body.top_logprobs or 0
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": texts[i]},
            "logprobs": _logprobs(service, tokens[i], num_top) if plan.body.logprobs else None,
            "finish_reason": reasons[i],
        }
        for i in range(plan.body.n)
    ]
    counts = usage(len(plan.prompt_ids), generation)
    return {**_head(service, plan, "chat.completion"), "choices": choices, "usage": counts, **extras}
