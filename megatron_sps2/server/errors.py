"""Errors as clients see them: a status and OpenAI's JSON, whatever it is that went wrong."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

logger = logging.getLogger(__name__)

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "service_unavailable",
    504: "timeout_error",
}


class ApiError(Exception):
    """One line for the client: the value, the rule, the fix."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {} if retry_after_s is None else {"Retry-After": str(max(1, math.ceil(retry_after_s)))}

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Json:
        return Json(self.body(), self.status, self.headers)


class Json(JSONResponse):
    """JSON in ASCII, so that half a surrogate pair in what is echoed cannot break it; NaN becomes null."""

    def render(self, content: Any) -> bytes:
        return to_json(content).encode()


def to_json(content: Any) -> str:
    """One line of JSON."""
    return json.dumps(_without_nan(content), separators=(",", ":"), allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(each) for each in value]
    return value


def install(app: FastAPI) -> None:
    """All errors of `app` are answered in this form."""
    app.add_exception_handler(ApiError, _own)
    app.add_exception_handler(HTTPException, _starlettes)
    app.add_exception_handler(RequestValidationError, _pydantics)
    app.add_exception_handler(Exception, _unexpected)


async def _own(request: Request, error: Exception) -> Json:
    assert isinstance(error, ApiError)
    return error.response()


async def _starlettes(request: Request, error: Exception) -> Json:
    assert isinstance(error, HTTPException)
    response = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}").response()
    response.headers.update(error.headers or {})
    return response


async def _pydantics(request: Request, error: Exception) -> Json:
    assert isinstance(error, RequestValidationError)
    found = error.errors()[0]
    place = ".".join(str(part) for part in found["loc"] if part != "body") or "the body"
    given = "" if found["type"] in ("missing", "json_invalid") else f"={_short(found.get('input'))}"
    return ApiError(400, f"{place}{given}: {found['msg']}", param=place).response()


async def _unexpected(request: Request, error: Exception) -> Json:
    logger.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return ApiError(500, f"internal error: {type(error).__name__}; the server's log says more").response()


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
