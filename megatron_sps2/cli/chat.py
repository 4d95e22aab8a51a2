"""`sps2 chat`: turn after turn; what was said stays in the KV cache and only new tokens are prefilled."""

from __future__ import annotations

import argparse
import queue
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megatron_sps2.cli.arguments import sampling_params
from megatron_sps2.cli.generate import check_flags, engine_config
from megatron_sps2.cli.world import in_world
from megatron_sps2.model.manifest import load_model_config

if TYPE_CHECKING:
    from megatron_sps2.engine.engine import Engine
    from megatron_sps2.engine.request import Request
    from megatron_sps2.engine.tokenizer import Tokenizer

# While the user thinks, other ranks wait in a collective; an empty step this often, or three times within the
# collective's time limit, keeps it from timing out.
IDLE_STEP_S = 30.0


def run(args: argparse.Namespace) -> int:
    return in_world(args, _chat, check_flags)


def _chat(args: argparse.Namespace) -> int:
    """On every rank; rank 0 talks."""
    from megatron_sps2.cli.answer import NoAnswerError
    from megatron_sps2.engine.build import build_engine
    from megatron_sps2.engine.tokenizer import load_tokenizer
    from megatron_sps2.parallel.collectives import from_first_rank

    tokenizer: Tokenizer | None = None

    def measure() -> int:
        """Tokens the cache must hold; raises where the chat template is missing or refuses --system."""
        nonlocal tokenizer  # rank 0's alone
        tokenizer = load_tokenizer(args.checkpoint)
        tokenizer.encode_chat([*_opening(args), {"role": "user", "content": "?"}])
        return args.max_model_len or load_model_config(args.checkpoint).max_seq_len

    longest = from_first_rank(measure)
    engine = build_engine(engine_config(args, longest))
    args.heart.watch(engine.ledger.activity)
    if not engine.is_leader:
        engine.follow()
        return 0
    assert tokenizer is not None, "rank 0 has measured"
    conversation = Conversation(engine, tokenizer, args)
    if sys.stdin.isatty():
        print("Type a message; an empty line or Ctrl-D ends the chat.", file=sys.stderr)
    try:
        for line in _lines(engine, min(IDLE_STEP_S, args.timeout_s / 3)):
            conversation.say(line)
    except (NoAnswerError, UnreadableInputError):
        engine.stop()  # No rank is inside a step.
        raise
    engine.stop()
    return 0


def _opening(args: argparse.Namespace) -> list[dict[str, str]]:
    return [{"role": "system", "content": args.system}] if args.system else []


class UnreadableInputError(RuntimeError):
    """stdin gave no text."""


@dataclass(slots=True)
class Conversation:
    """Messages so far, and the request whose cache holds them."""

    engine: Engine
    tokenizer: Tokenizer
    args: argparse.Namespace
    messages: list[dict[str, str]] = field(init=False)
    _request: Request | None = None
    # The conversation's tokens. The cache holds them all but the last, which was sampled and never fed.
    _ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.messages = _opening(self.args)

    def say(self, text: str) -> None:
        """One turn: prints the answer. A turn that does not fit is refused and forgotten."""
        from megatron_sps2.cli.answer import stream_answer

        self.messages.append({"role": "user", "content": text})
        try:
            ids = self.tokenizer.encode_chat(self.messages)
            request = self._start(ids)
        except ValueError as error:
            self.messages.pop()
            print(f"sps2: {error}", file=sys.stderr)
            return
        answer = stream_answer(self.engine, request, self.tokenizer, show=True)
        self._request, self._ids = request, [*ids, *request.output_ids]
        self.messages.append({"role": "assistant", "content": answer})

    def _start(self, ids: list[int]) -> Request:
        """Goes on where the cache ends if `ids` go on with the conversation's tokens, else starts anew."""
        params, known = sampling_params(self.args), self._ids
        if self._request and ids[: len(known)] == known:
            return self.engine.continue_request(self._request, ids[len(known) - 1 :], params)
        request = self.engine.add_request(ids, params)
        if self._request:
            self.engine.release(self._request)
        return request


def _lines(engine: Engine, idle_step_s: float) -> Iterator[str]:
    """Lines of stdin until an empty one, with idle steps while nothing is typed."""
    typed: queue.Queue[str | UnreadableInputError] = queue.Queue()

    def read() -> None:
        try:
            for line in sys.stdin:
                typed.put(line.rstrip("\n"))
            typed.put("")
        except (ValueError, OSError) as error:
            typed.put(UnreadableInputError(f"stdin cannot be read as text: {error}"))

    threading.Thread(target=read, daemon=True).start()
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        while True:
            try:
                line = typed.get(timeout=idle_step_s)
                break
            except queue.Empty:
                engine.idle()
        if isinstance(line, UnreadableInputError):
            raise line
        if not line:
            return
        yield line
