"""Routes about the server itself: models, health, metrics, version, tokens of a text, abort, the page."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from starlette.responses import FileResponse, Response

from megatron_sps2 import __version__
from megatron_sps2.server.chat import encode_chat
from megatron_sps2.server.errors import ApiError, Json
from megatron_sps2.server.live import live_state
from megatron_sps2.server.sampling import check_model, encode, refuse, users_mistake
from megatron_sps2.server.schema import AbortRequest, DetokenizeRequest, TokenizeRequest
from megatron_sps2.server.service import Service

PAGE = Path(__file__).with_name("page.html")
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def router(service: Service) -> APIRouter:
    # Routes that are no coroutines run in threads: a long text would hold up every stream.
    routes, client = APIRouter(), service.client

    @routes.get("/v1/models", summary="The model that is served")
    async def models() -> Response:
        model: dict[str, Any] = {
            "id": service.config.served_model_name,
            "object": "model",
            "created": service.started_at,
            "owned_by": "megatron_sps2",
            "max_model_len": client.ready.max_model_len,
        }
        return Json({"object": "list", "data": [model]})

    @routes.post("/tokenize", summary="Token ids of a text or a conversation")
    def tokenize(body: TokenizeRequest) -> Response:
        check_model(body.model, service.config.served_model_name)
        refuse((body.prompt is None) == (body.messages is None), "give prompt or messages, one of them")
        if body.messages is not None:
            ids = encode_chat(service, body.messages)
        else:
            ids = encode(body.prompt or "", service.tokenizer)
        return Json({"count": len(ids), "max_model_len": client.ready.max_model_len, "tokens": ids})

    @routes.post("/detokenize", summary="The text of token ids")
    def detokenize(body: DetokenizeRequest) -> Response:
        check_model(body.model, service.config.served_model_name)
        tokenizer = service.tokenizer
        if tokenizer is None:
            raise ApiError(400, "the checkpoint has no tokenizer")
        size = client.ready.vocab_size
        refuse(any(not 0 <= i < size for i in body.tokens), f"token ids must lie in 0..{size - 1}", "tokens")
        return Json({"prompt": users_mistake(lambda: tokenizer.decode(body.tokens), "tokens")})

    @routes.post("/abort", summary="End an answer, wherever it is")
    async def abort(body: AbortRequest) -> Response:
        generation = service.generations.get(body.request_id)
        if generation is None:
            raise ApiError(404, f"request_id={body.request_id!r} is not running", param="request_id")
        generation.abort()
        return Json({"request_id": body.request_id, "aborted": True})

    @routes.get("/health", summary="200 where every rank has answered within the last seconds")
    async def health() -> Response:
        now = time.monotonic()
        ages = {str(rank): round(now - state.seen_at, 3) for rank, state in sorted(client.ranks.items())}
        body = {"state": client.state, "beat_age_s": ages, "detail": client.lost_message or None}
        if client.is_healthy:
            return Json(body)
        return Json(body, 503, {"Retry-After": "5"})

    @routes.get("/metrics", summary="For Prometheus")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type=METRICS_TYPE)

    @routes.get("/version", summary="The version of the server")
    async def version() -> Response:
        return Json({"version": __version__})

    @routes.get("/live", summary="What the live page shows")
    async def live(since: float = 0.0) -> Response:
        return Json(live_state(service, since))

    @routes.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(PAGE, media_type="text/html; charset=utf-8")

    return routes
