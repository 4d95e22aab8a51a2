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

# While the user thinks, other ranks wait in a collective; an empty step this often keeps it from timing out.
IDLE_STEP_S = 30.0


def run(args: argparse.Namespace) -> int:
    return in_world(args, _chat, check_flags)


def _chat(args: argparse.Namespace) -> int:
    """On every rank; rank 0 talks."""
    from megatron_sps2.engine.build import build_engine
    from megatron_sps2.engine.tokenizer import load_tokenizer
    from megatron_sps2.parallel.collectives import from_first_rank

    def measure() -> int:
        """Tokens the cache must hold; raises when there is no chat template."""
        load_tokenizer(args.checkpoint).encode_chat([{"role": "user", "content": "?"}])
        return args.max_model_len or load_model_config(args.checkpoint).max_seq_len

    longest = from_first_rank(measure)
    engine = build_engine(engine_config(args, longest))
    if not engine.is_leader:
        engine.follow()
        return 0
    conversation = Conversation(engine, load_tokenizer(args.checkpoint), args)
    if sys.stdin.isatty():
        print("Type a message; an empty line or Ctrl-D ends the chat.", file=sys.stderr)
    for line in _lines(engine):
        conversation.say(line)
    engine.stop()
    return 0


@dataclass(slots=True)
class Conversation:
    """Messages so far, and the request whose cache holds them."""

    engine: Engine
    tokenizer: Tokenizer
    args: argparse.Namespace
    messages: list[dict[str, str]] = field(default_factory=list)
    _request: Request | None = None
    _cached_ids: list[int] = field(default_factory=list)  # what the cache holds, in order

    def __post_init__(self) -> None:
        if self.args.system:
            self.messages.append({"role": "system", "content": self.args.system})

    def say(self, text: str) -> None:
        """One turn: prints the answer. A turn that does not fit is refused and forgotten."""
        from megatron_sps2.cli.answer import stream_answer

        self.messages.append({"role": "user", "content": text})
        ids = self.tokenizer.encode_chat(self.messages)
        try:
            request = self._start(ids)
        except ValueError as error:
            self.messages.pop()
            print(f"sps2: {error}", file=sys.stderr)
            return
        answer = stream_answer(self.engine, request, self.tokenizer, show=True)
        # The last sampled token was not fed to the model: it is not in the cache.
        self._request, self._cached_ids = request, [*ids, *request.output_ids[:-1]]
        self.messages.append({"role": "assistant", "content": answer})

    def _start(self, ids: list[int]) -> Request:
        """Goes on where the cache ends if it holds a beginning of `ids`, else starts anew."""
        params, cached = sampling_params(self.args), self._cached_ids
        if self._request and ids[: len(cached)] == cached:
            return self.engine.continue_request(self._request, ids[len(cached) :], params)
        request = self.engine.add_request(ids, params)
        if self._request:
            self.engine.release(self._request)
        return request


def _lines(engine: Engine) -> Iterator[str]:
    """Lines of stdin until an empty one, with idle steps while nothing is typed."""
    typed: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            typed.put(line.rstrip("\n"))
        typed.put("")

    threading.Thread(target=read, daemon=True).start()
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        while True:
            try:
                line = typed.get(timeout=IDLE_STEP_S)
                break
            except queue.Empty:
                engine.idle()
        if not line:
            return
        yield line
