"""What stands before every route: the size of the body, the key, and the count of answers. Plain ASGI."""

from __future__ import annotations

import secrets

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_sps2.server.errors import ApiError
from megatron_sps2.server.metrics import Metrics

# Supervisors, Prometheus and the page itself have no key; what the page shows asks for one.
OPEN_PATHS = frozenset({"/health", "/metrics", "/version", "/", "/docs", "/openapi.json", "/favicon.ico"})


class Gate:
    """Reads the whole body before the app sees any, so that one that is too large never reaches it."""

    def __init__(
        self, app: ASGIApp, *, api_keys: tuple[str, ...], max_body_bytes: int, metrics: Metrics
    ) -> None:
        self._app, self._max, self._metrics = app, max_body_bytes, metrics
        self._keys = tuple(key.encode() for key in api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        counted = self._counting(scope, send)
        try:
            self._check_key(scope)
            body = await self._read(scope, receive)
        except ApiError as error:
            self._metrics.refused({401: "key", 413: "body_too_large"}.get(error.status, "other"))
            await error.response()(scope, receive, counted)
            return
        if body is not None:
            await self._app(scope, _replay(body, receive), counted)

    def _check_key(self, scope: Scope) -> None:
        if not self._keys or scope["path"] in OPEN_PATHS:
            return
        header = dict(scope["headers"]).get(b"authorization", b"")
        given = header[7:] if header[:7].lower() == b"bearer " else b""
        if not any(secrets.compare_digest(given, key) for key in self._keys):
            raise ApiError(401, "no or a wrong API key; send the header Authorization: Bearer KEY")

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body; None where the client went away."""
        length = dict(scope["headers"]).get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._max:
            raise self._too_large(int(length))
        body = bytearray()
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            body += message.get("body", b"")
            if len(body) > self._max:
                raise self._too_large(len(body))
            if not message.get("more_body", False):
                return bytes(body)

    def _too_large(self, size: int) -> ApiError:
        return ApiError(413, f"a body of {size} bytes or more exceeds {self._max}; send less, or token ids")

    def _counting(self, scope: Scope, send: Send) -> Send:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                route = scope.get("route")
                self._metrics.http(getattr(route, "path", "other"), message["status"])
            await send(message)

        return counting


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once more, then whatever else comes: the disconnect."""
    sent = False

    async def again() -> Message:
        nonlocal sent
        if sent:
            return await receive()
        sent = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
