"""PUT /api, as Megatron's text generation server has it: texts with their prompts, errors as plain text."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import PlainTextResponse, Response

from megatron_sps2.server.errors import ApiError
from megatron_sps2.server.generation import Ask
from megatron_sps2.server.protocol import Token
from megatron_sps2.server.sampling import check_length, encode, make_params, pick_seed, refuse
from megatron_sps2.server.schema import MegatronRequest, Sampling
from megatron_sps2.server.service import Service, answer_at_once, new_id


def router(service: Service) -> APIRouter:
    routes = APIRouter()

    @routes.put("/api", summary="Megatron's text generation")
    async def api(body: MegatronRequest, request: Request) -> Response:
        name = new_id("api")
        try:
            asks = await asyncio.to_thread(_asks, service, body)
            return await answer_at_once(request, name, lambda: _answer(service, name, body, asks))
        except ApiError as error:
            return PlainTextResponse(error.message.encode("ascii", "replace"), error.status, error.headers)

    return routes


def _asks(service: Service, body: MegatronRequest) -> list[Ask]:
    ready = service.client.ready
    refuse(body.top_k and body.top_p, "top_k and top_p are both set; use one of them")
    refuse(body.tokens_to_generate == 0 and not body.logprobs, "tokens_to_generate=0 needs logprobs=true")
    prompts = [encode(text, service.tokenizer) for text in body.prompts]
    if body.add_BOS:
        bos = service.bos_token_id
        refuse(bos is None, "add_BOS=true and the tokenizer has no BOS token; leave it out", "add_BOS")
        prompts = [[bos, *ids] for ids in prompts]  # type: ignore[list-item]
    num_tokens = max(1, body.tokens_to_generate)
    for ids in prompts:
        check_length(ids, num_tokens, ready)
    stop = ["\n"] if body.stop_on_eol else ["\n\n"] if body.stop_on_double_eol else []
    like = Sampling(temperature=body.temperature, top_k=body.top_k, top_p=body.top_p or 1.0, stop=stop)
    seed, scored = pick_seed(body.random_seed or None), 0 if body.logprobs else None
    return [
        Ask(
            prompt_ids=ids,
            params=make_params(like, i, seed, max_tokens=num_tokens, logprobs=scored, prompt_logprobs=scored),
        )
        for i, ids in enumerate(prompts)
    ]


async def _answer(service: Service, name: str, body: MegatronRequest, asks: list[Ask]) -> dict[str, Any]:
    generation = service.begin(Sampling(), asks)
    tokens = [list[Token]() for _ in asks]
    scores: list[list[Token | None]] = [[] for _ in asks]
    silent = body.tokens_to_generate == 0
    async with contextlib.aclosing(service.pieces(name, generation)) as pieces:
        async for piece in pieces:
            scores[piece.index] += piece.prompt_logprobs or []
            tokens[piece.index] += [] if silent else piece.tokens
    ids = [
        [*ask.prompt_ids, *(token.token_id for token in mine)] for ask, mine in zip(asks, tokens, strict=True)
    ]
    logprobs = [
        # Megatron tells nothing of the first token: nothing came before it.
        [each.logprob for each in (*before[1:], *mine) if each]
        for before, mine in zip(scores, tokens, strict=True)
    ]
    return {
        # Decoded as a whole, as Megatron does: a space between prompt and answer may belong to neither.
        "text": [service.tokenizer.decode(mine) if service.tokenizer else "" for mine in ids],
        "segments": [[service.token_text(each) for each in mine] for mine in ids],
        "tokens": ids,
        "logprobs": logprobs if body.logprobs else None,
    }
