"""What a driver and the run that asks it say to each other: one JSON line each way on the driver's pipes.

Standard library only: every peer's own Python imports this file. Knows no engine.

A request is {"op": "prefill", "ids": [...]}, {"op": "decode", "prompts": [[...], ...], "num_tokens": N} or
{"op": "attention", "num_tokens": N}; an answer {"seconds": S, "tokens": [each prompt's first token]} or
{"error": why}. Before the first request comes {"ready": what runs} or {"error": why nothing does}.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from typing import IO, Any

# What was timed inside the engine, and the first token of each prompt.
Answer = tuple[float, list[int]]


class Driver:
    """One engine with its model loaded; a driver offers what it can."""

    def prefill(self, ids: list[int]) -> Answer:
        """Seconds until the first token of one prompt, and that token."""
        raise NotImplementedError("this peer has no prefill")

    def decode(self, prompts: list[list[int]], num_tokens: int) -> Answer:
        """Seconds for num_tokens more tokens of all prompts once each has its first, and the first ones."""
        raise NotImplementedError("this peer has no decode on CPU")

    def attention(self, num_tokens: int) -> Answer:
        """Seconds of one attention layer over num_tokens, no tokens."""
        raise NotImplementedError("this peer is not measured by its attention layer")


Build = Callable[[argparse.Namespace], tuple[Driver, str]]


def serve(build: Build, description: str | None) -> None:
    """Builds the driver from its flags, says what it is, then answers requests until the pipe closes."""
    args = _arguments(description)
    # Engines print what they like: their stdout becomes stderr, and only answers go down the pipe.
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        driver, what = build(args)
    except Exception as error:  # outermost: a broken peer is named, the others run
        _say(pipe, {"error": _why(error)})
        return
    _say(pipe, {"ready": what})
    for line in sys.stdin:
        _say(pipe, _answer(driver, json.loads(line)))


def _arguments(description: str | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", required=True, help="what this driver loads: a folder or a file")
    parser.add_argument("--max-length", type=int, required=True, help="longest prompt and answer together")
    parser.add_argument("--decode-length", type=int, required=True, help="the same, of those that decode")
    parser.add_argument("--num-decodes", type=int, required=True, help="most prompts that decode together")
    parser.add_argument("--threads", type=int, default=2, help="threads, or ranks of one thread")
    parser.add_argument("--setting", default="", help="which variant, of a peer that has several")
    return parser.parse_args()


def _answer(driver: Driver, request: dict[str, Any]) -> dict[str, Any]:
    op = request.pop("op")
    try:
        seconds, tokens = getattr(driver, op)(**request)
    except Exception as error:  # outermost: this request failed, the next one may not
        return {"error": _why(error)}
    return {"seconds": seconds, "tokens": tokens}


def _say(pipe: IO[str], message: dict[str, Any]) -> None:
    pipe.write(json.dumps(message) + "\n")
    pipe.flush()


def _why(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]
