"""Answers of one HTTP request as they come: tokens to text, stop strings, deadline; leaving them aborts.

Knows no JSON shapes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from megatron_sps2.config import AttentionMode, SamplingParams
from megatron_sps2.engine.detokenizer import Detokenizer
from megatron_sps2.engine.tokenizer import Tokenizer
from megatron_sps2.server.engine_client import EngineClient, Stream
from megatron_sps2.server.errors import ApiError
from megatron_sps2.server.protocol import Delta, Token


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One choice of an answer."""

    prompt_ids: list[int]
    params: SamplingParams


@dataclass(slots=True, kw_only=True)
class Piece:
    """News of choice `index`. The text may be empty: a character, or a stop string, may be unfinished."""

    index: int
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    prompt_logprobs: list[Token | None] | None = None
    finish_reason: str | None = None
    timings: dict[str, Any] | None = None
    csa: dict[str, Any] | None = None


class Generation:
    """Several choices in the engine at once. `pieces` may be iterated once; leaving it aborts the rest."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer | None,
        asks: Sequence[Ask],
        *,
        attention: AttentionMode | None,
        timeout_s: float | None,
    ) -> None:
        self._client, self._tokenizer, self._asks = client, tokenizer, asks
        self._attention, self._timeout_s = attention, timeout_s
        self._streams: list[Stream] = []
        self.num_generated = 0
        self.num_cached = 0  # prompt tokens of the first choice of each prompt are what usage tells

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """In order of arrival. Raises ApiError: refused, timed out, failed, lost."""
        arrived: asyncio.Queue[Piece | ApiError] = asyncio.Queue()
        deadline = None if self._timeout_s is None else time.monotonic() + self._timeout_s
        tasks = list[asyncio.Task[None]]()
        num_open, reason = len(self._asks), "abort"
        try:
            for index, ask in enumerate(self._asks):
                stream = await self._client.submit(ask.prompt_ids, ask.params, self._attention)
                self._streams.append(stream)
                tasks.append(asyncio.create_task(self._follow(index, stream, ask, arrived)))
            while num_open:
                piece = await self._next(arrived, deadline)
                if isinstance(piece, ApiError):
                    reason = "error"
                    raise piece
                num_open -= piece.finish_reason is not None
                yield piece
        except TimeoutError:
            reason = "timeout"
            raise ApiError(
                504, f"not finished within timeout={self._timeout_s} s; allow more time or ask for less"
            ) from None
        finally:
            for task in tasks:
                task.cancel()
            for stream in self._streams:
                await self._client.abort(stream, reason)

    def abort(self) -> None:
        """Every choice that runs ends with finish_reason abort."""
        for stream in self._streams:
            if stream.request_id in self._client.streams:
                stream.news.put_nowait(Delta(request_id=stream.request_id, finish_reason="abort"))

    async def _next(
        self, arrived: asyncio.Queue[Piece | ApiError], deadline: float | None
    ) -> Piece | ApiError:
        if deadline is None:
            return await arrived.get()
        async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
            return await arrived.get()

    async def _follow(
        self, index: int, stream: Stream, ask: Ask, arrived: asyncio.Queue[Piece | ApiError]
    ) -> None:
        """One choice, until it ends."""
        text = None
        if self._tokenizer:
            text = Detokenizer(self._tokenizer, ask.params.stop, ask.params.min_tokens)
        while True:
            delta = await stream.news.get()
            if isinstance(delta, ApiError) or delta.finish_reason == "error":
                error = delta if isinstance(delta, ApiError) else ApiError(500, delta.error or "failed")
                arrived.put_nowait(error)
                return
            piece = self._piece(index, delta, text, stream)
            arrived.put_nowait(piece)
            if piece.finish_reason:
                await self._client.abort(stream, piece.finish_reason)
                return

    def _piece(self, index: int, delta: Delta, text: Detokenizer | None, stream: Stream) -> Piece:
        piece = Piece(index=index, prompt_logprobs=delta.prompt_logprobs, csa=delta.csa)
        for token in delta.tokens:
            if text is None or not text.finished:
                piece.tokens.append(token)
                piece.text += text.push(token.token_id) if text else ""
        piece.finish_reason = delta.finish_reason
        if delta.finish_reason and text:
            piece.text += text.flush()
        if text is not None and text.finished:
            piece.finish_reason = "stop"
        self.num_generated += len(piece.tokens)
        if delta.timings:
            piece.timings = msgspec.to_builtins(delta.timings)
            self.num_cached = max(self.num_cached, delta.timings.num_cached_tokens)
        elif piece.finish_reason:
            piece.timings = {"num_prompt_tokens": stream.num_prompt_tokens}
        if piece.timings is not None and stream.first_token_at is not None:
            piece.timings["front_end_ttft_ms"] = 1e3 * (stream.first_token_at - stream.submitted_at)
        return piece
