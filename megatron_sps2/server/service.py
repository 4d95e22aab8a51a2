"""What every route works with, and the two ways to answer: at once, or as a stream of server-sent events."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fastapi import Request
from starlette.responses import Response, StreamingResponse

from megatron_sps2.engine.tokenizer import Tokenizer
from megatron_sps2.server.engine_client import EngineClient
from megatron_sps2.server.errors import ApiError, Json, to_json
from megatron_sps2.server.front_end_config import FrontEndConfig
from megatron_sps2.server.generation import Ask, Generation, Piece
from megatron_sps2.server.metrics import Metrics
from megatron_sps2.server.schema import Sampling

T = TypeVar("T")


@dataclass(slots=True, kw_only=True)
class Service:
    """One front end."""

    config: FrontEndConfig
    client: EngineClient
    metrics: Metrics
    tokenizer: Tokenizer | None
    started_at: int = field(default_factory=lambda: int(time.time()))
    generations: dict[str, Generation] = field(default_factory=dict)  # by the id that clients see

    def begin(self, body: Sampling, asks: Sequence[Ask]) -> Generation:
        """ApiError 429 or 503 where there is no room."""
        self.client.check_room(len(asks))
        return Generation(
            self.client,
            self.tokenizer,
            asks,
            attention=body.attention,
            timeout_s=body.timeout or self.config.request_timeout_s,
        )

    async def pieces(self, name: str, generation: Generation) -> AsyncGenerator[Piece, None]:
        """Its pieces; while they come it can be aborted by its name."""
        self.generations[name] = generation
        try:
            async with contextlib.aclosing(generation.pieces()) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            del self.generations[name]

    @property
    def bos_token_id(self) -> int | None:
        return self.tokenizer.bos_token_id if self.tokenizer else None

    def token_text(self, token_id: int) -> str:
        return self.tokenizer.decode([token_id]) if self.tokenizer else str(token_id)


def new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


async def answer_at_once(
    request: Request, name: str, make: Callable[[], Awaitable[Mapping[str, Any]]]
) -> Response:
    """`make()`'s object as JSON; cancelled, and nothing is sent, when the client goes away."""
    made = await unless_gone(request, make())
    return Response(status_code=499) if made is None else Json(made, headers={"X-Request-Id": name})


async def unless_gone(request: Request, work: Awaitable[T]) -> T | None:
    """What `work` gives; None when the client went away before, and then it is cancelled."""
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(request: Request) -> None:
    """Returns when the client has disconnected; its body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def answer_as_stream(
    request: Request, name: str, events: AsyncGenerator[Mapping[str, Any], None]
) -> StreamingResponse:
    """Each object as an event, then [DONE]; an ApiError as the last event, and then no [DONE]."""
    return StreamingResponse(
        _lines(request, events),
        media_type="text/event-stream",
        headers={"X-Request-Id": name, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )


async def _lines(request: Request, events: AsyncGenerator[Mapping[str, Any], None]) -> AsyncIterator[str]:
    gone = asyncio.ensure_future(_gone(request))
    try:
        async with contextlib.aclosing(events):
            while (event := await _next_unless(gone, events)) is not None:
                yield f"data: {to_json(event)}\n\n"
        if not gone.done():
            yield "data: [DONE]\n\n"
    except ApiError as error:
        yield f"data: {to_json(error.body())}\n\n"
    finally:
        gone.cancel()


async def _next_unless(gone: asyncio.Future[None], events: AsyncGenerator[T, None]) -> T | None:
    """The next event; None at the end of them, or once the client is gone."""
    step: asyncio.Future[T | None] = asyncio.ensure_future(_next(events))
    waited: set[asyncio.Future[Any]] = {step, gone}
    try:
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        return step.result() if step.done() else None
    finally:
        if not step.done():  # also when this stream was cancelled: `events` can't be closed while it runs
            step.cancel()
            await asyncio.gather(step, return_exceptions=True)


async def _next(events: AsyncGenerator[T, None]) -> T | None:
    return await anext(events, None)
