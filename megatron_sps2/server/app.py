"""The FastAPI application: routes, errors and the gate before them."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.types import ASGIApp

from megatron_sps2 import __version__
from megatron_sps2.server import chat, completions, errors, megatron_api, status_api
from megatron_sps2.server.gate import Gate
from megatron_sps2.server.service import Service

ERRORS = {
    400: {"description": "A value that cannot be served: the value, the rule, the fix"},
    401: {"description": "No or a wrong API key"},
    404: {"description": "An unknown model or request"},
    413: {"description": "The body is too large"},
    429: {"description": "The queue is full; Retry-After says when to try again"},
    503: {"description": "Starting, draining or lost; Retry-After says when to try again"},
    504: {"description": "The deadline has passed"},
}


def make_app(service: Service) -> ASGIApp:
    """All of it, ready for an ASGI server."""
    app = FastAPI(title="megatron_sps2", version=__version__, responses=ERRORS)  # type: ignore[arg-type]
    errors.install(app)
    for part in (completions, chat, megatron_api, status_api):
        app.include_router(part.router(service))
    return Gate(
        app,
        api_keys=service.config.api_keys,
        max_body_bytes=service.config.max_body_bytes,
        metrics=service.metrics,
    )
