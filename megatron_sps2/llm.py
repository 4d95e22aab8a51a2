"""Offline batches from Python: `LLM` starts ranks as `sps2 serve` does and speaks to them without HTTP."""

from __future__ import annotations

import argparse
import itertools
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import zmq

from megatron_sps2.cli.front_end import endpoints_in
from megatron_sps2.cli.layout import settle_layout
from megatron_sps2.cli.main import parse_args
from megatron_sps2.cli.serve import check_serve, serve_rank
from megatron_sps2.cli.world import in_local_world
from megatron_sps2.config import SamplingParams
from megatron_sps2.engine.detokenizer import Detokenizer
from megatron_sps2.engine.tokenizer import TOKENIZER_FILE, Message, Tokenizer, load_tokenizer
from megatron_sps2.parallel.rank_env import RankEnv
from megatron_sps2.server.protocol import (
    Abort,
    Delta,
    Deltas,
    Lost,
    Ready,
    Refused,
    Stop,
    Submit,
    Timings,
    ToEngine,
    Token,
    decode_beat,
    decode_from_engine,
    encode,
)

Prompt = str | Sequence[int]
POLL_MS = 200
STOP_S = 30.0
# Settings of `sps2 serve` about processes that an LLM does not have.
NOT_OURS = ("role", "engine_address", "max_restarts")


@dataclass(slots=True, kw_only=True)
class Answer:
    """One prompt's answer. `text` ends before a stop string; it is empty without a tokenizer."""

    prompt_ids: list[int]
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    prompt_logprobs: list[Token | None] | None = None
    finish_reason: str | None = None
    error: str | None = None
    timings: Timings | None = None
    csa: dict[str, Any] | None = None

    @property
    def token_ids(self) -> list[int]:
        return [token.token_id for token in self.tokens]


class LLM:
    """A model on dp x sp x tp ranks of this host, for batches of prompts.

    Settings are those of `sps2 serve`, with underscores: LLM("ckpt", sp=2, policy="sarathi"). Ranks are
    processes that import the caller's main module: a script needs `if __name__ == "__main__":`. Use as a
    context, or call `close`. Raises ValueError for settings that do not fit, RuntimeError under a launcher
    and when a rank is lost.
    """

    def __init__(self, checkpoint: str, **settings: Any) -> None:
        if RankEnv.detect() is not None:
            raise RuntimeError(
                "LLM starts its ranks itself; under torchrun, mpirun or srun use megatron_sps2.engine.build"
            )
        self._args = _settings(checkpoint, settings)
        settle_layout(self._args)
        check_serve(self._args)
        has_tokenizer = (Path(checkpoint) / TOKENIZER_FILE).is_file()
        self._tokenizer: Tokenizer | None = load_tokenizer(checkpoint) if has_tokenizer else None
        self._folder = tempfile.TemporaryDirectory(prefix="sps2-")
        self._args.endpoints = endpoints_in(self._folder.name)
        self._names = itertools.count()
        self._exit_code: int | None = None
        self._engine, self._beats = _bind(self._args.endpoints.engine, self._args.endpoints.beats)
        self._world = threading.Thread(target=self._run_world, name="sps2 world", daemon=True)
        self._world.start()
        self._replicas: list[bytes] = []
        while len(self._replicas) < self._args.dp:
            ready = [who for who, message in self._receive() if isinstance(message, Ready)]
            self._replicas += [who for who in ready if who not in self._replicas]

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        attention: Any = None,
    ) -> list[Answer]:
        """Texts or token ids -> their answers, in order; all run at once. `params`: one for all, or one each.

        Raises ValueError, naming the prompt, for one that cannot be served; then none is answered.
        """
        many = _as_list(prompts)
        each = _one_each(params or SamplingParams(), len(many))
        answers = [Answer(prompt_ids=self._encode(prompt)) for prompt in many]
        run = _Run(answers, each, self._tokenizer, self._names)
        for i, (name, answer) in enumerate(run.open.items()):
            replica = self._replicas[i % len(self._replicas)]
            run.replicas[name] = replica
            submit = Submit(
                request_id=name,
                prompt_ids=answer.prompt_ids,
                params=run.params[name],
                attention=attention,
            )
            self._send(replica, submit)
        while run.open:
            for _, message in self._receive():
                for name in run.take(message):
                    self._send(run.replicas[name], Abort(request_id=name))
        if run.refusal:
            raise ValueError(run.refusal)
        return answers

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Answer:
        """A conversation, by the model's chat template -> the assistant's answer."""
        if self._tokenizer is None:
            raise ValueError(f"the checkpoint has no {TOKENIZER_FILE}; a chat needs one")
        return self.generate([self._tokenizer.encode_chat(messages)], params)[0]

    def close(self) -> None:
        """Ends the ranks. Fine to call twice."""
        for replica in self._replicas:
            self._send(replica, Stop())
        self._replicas = []
        self._world.join(STOP_S)
        self._engine.close(0)
        self._beats.close(0)
        self._folder.cleanup()

    def _run_world(self) -> None:
        self._exit_code = in_local_world(self._args, serve_rank)

    def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return list(prompt)
        if self._tokenizer is None:
            raise ValueError(f"the checkpoint has no {TOKENIZER_FILE}; give token ids instead of text")
        return self._tokenizer.encode(prompt)

    def _send(self, replica: bytes, message: ToEngine) -> None:
        self._engine.send_multipart([replica, encode(message)])

    def _receive(self) -> list[tuple[bytes, object]]:
        """What the leaders say within POLL_MS; RuntimeError when the world is lost."""
        ready = dict(self._poller().poll(POLL_MS))
        if self._beats in ready and isinstance(message := decode_beat(self._beats.recv()), Lost):
            raise RuntimeError(message.message)
        if not self._world.is_alive():
            raise RuntimeError(f"the ranks have ended with code {self._exit_code}; stderr says why")
        if self._engine not in ready:
            return []
        who, body = self._engine.recv_multipart()
        return [(who, decode_from_engine(body))]

    def _poller(self) -> zmq.Poller:
        poller = zmq.Poller()
        poller.register(self._engine, zmq.POLLIN)
        poller.register(self._beats, zmq.POLLIN)
        return poller


class _Run:
    """The open requests of one call."""

    def __init__(
        self,
        answers: Sequence[Answer],
        params: Sequence[SamplingParams],
        tokenizer: Tokenizer | None,
        names: itertools.count[int],
    ) -> None:
        self.open = {str(next(names)): answer for answer in answers}
        self.params = dict(zip(self.open, params, strict=True))
        self.replicas: dict[str, bytes] = {}
        self.refusal: str | None = None
        self._numbers = {name: i for i, name in enumerate(self.open)}
        self._texts = {
            name: Detokenizer(tokenizer, each.stop, each.min_tokens)
            for name, each in self.params.items()
            if tokenizer
        }

    def take(self, message: object) -> list[str]:
        """News of a leader -> the requests to abort."""
        if isinstance(message, Refused) and message.request_id in self.open:
            self.refusal = f"prompt {self._numbers[message.request_id]}: {message.message}"
            others = [name for name in self.open if name != message.request_id]
            self.open.clear()
            return others
        if isinstance(message, Deltas):
            return [name for delta in message.items if (name := self._add(delta))]
        return []

    def _add(self, delta: Delta) -> str | None:
        answer = self.open.get(delta.request_id)
        if answer is None:
            return None
        answer.prompt_logprobs = delta.prompt_logprobs or answer.prompt_logprobs
        answer.csa = delta.csa or answer.csa
        text = self._texts.get(delta.request_id)
        for token in delta.tokens:
            answer.tokens.append(token)
            answer.text += text.push(token.token_id) if text else ""
        answer.finish_reason, answer.error, answer.timings = delta.finish_reason, delta.error, delta.timings
        ended_by_text = text is not None and text.finished
        if delta.finish_reason and text:
            answer.text += text.flush()
        if delta.finish_reason or ended_by_text:
            del self.open[delta.request_id]
        if text is not None and text.finished:
            answer.finish_reason = "stop"
        return delta.request_id if ended_by_text and not delta.finish_reason else None


def _settings(checkpoint: str, settings: dict[str, Any]) -> argparse.Namespace:
    """The flags' defaults with these in their place. Raises ValueError for a name that is none."""
    args = parse_args(["serve", "--checkpoint", checkpoint])
    for name, value in settings.items():
        if not hasattr(args, name) or name in NOT_OURS:
            raise ValueError(f"{name}={value!r} is no setting; `sps2 serve --help` lists them")
        setattr(args, name, value)
    return args


def _bind(engine: str, beats: str) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    kinds = zmq.ROUTER, zmq.PULL
    sockets: list[zmq.Socket[bytes]] = [zmq.Context.instance().socket(kind) for kind in kinds]
    for bound, address in zip(sockets, (engine, beats), strict=True):
        bound.bind(address)
    return sockets[0], sockets[1]


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (len(prompts) and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _one_each(params: SamplingParams | Sequence[SamplingParams], count: int) -> list[SamplingParams]:
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise ValueError(f"{len(params)} params for {count} prompts; give one for all, or one each")
    return list(params)
