"""The loop of a replica's first rank: requests from the front end into the engine, its news back.

Knows the engine and the protocol; no HTTP, no text.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence

import msgspec
import numpy as np
import zmq

from megatron_sps2.engine.engine import Engine, Progress
from megatron_sps2.engine.request import FinishReason, Request
from megatron_sps2.engine.sampler import SampledToken
from megatron_sps2.server.protocol import (
    Abort,
    Delta,
    Deltas,
    EngineStats,
    FromEngine,
    Ready,
    Refused,
    Stop,
    Submit,
    Timings,
    Token,
    decode_to_engine,
    encode,
    identity,
)

logger = logging.getLogger(__name__)

STATS_S = 0.25
READY_S = 2.0
LINGER_MS = 1000
# Longest wait for a message while there is nothing to do; stats go out in between.
IDLE_POLL_S = 0.5


class Leader:
    """Runs a replica's engine for a front end until it says Stop."""

    def __init__(
        self,
        engine: Engine,
        endpoint: str,
        *,
        world: int,
        idle_step_s: float,
        max_num_seqs: int,
        policy: str,
    ) -> None:
        self._engine, self._world, self._idle_step_s = engine, world, idle_step_s
        self._max_num_seqs, self._policy = max_num_seqs, policy
        self._requests: dict[str, Request] = {}
        self._names: dict[int, str] = {}
        self._stopping = False
        self._audited = False
        self._stats_due = self._ready_due = self._stepped_at = time.monotonic()
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, identity(world, engine.place.replica))
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        self._socket.setsockopt(zmq.IPV6, 1)
        self._socket.connect(endpoint)

    def run(self) -> None:
        """Until Stop; then the other ranks are sent home too."""
        while not self._stopping:
            self._tell_state()
            self._take_messages()
            if self._engine.has_work:
                self._report(self._engine.step())
                self._audited, self._stepped_at = False, time.monotonic()
            else:
                self._rest()
        self._engine.stop()
        self._socket.close()

    def _rest(self) -> None:
        """Nothing to do: look for leaks once, and keep the other ranks' collective from timing out."""
        if not self._audited:
            leaked = self._engine.audit()
            if any(leaked):
                logger.error("KV blocks leaked, by rank of the replica: %s", leaked)
            self._audited, self._stats_due = True, 0.0
        elif time.monotonic() - self._stepped_at > self._idle_step_s:
            self._engine.idle()
            self._stepped_at = time.monotonic()

    def _take_messages(self) -> None:
        """All that have come; waits a little for one where there is nothing else to do."""
        if not self._engine.has_work and self._audited:
            self._socket.poll(int(1e3 * IDLE_POLL_S))
        while not self._stopping:
            try:
                message = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._take(decode_to_engine(message))
            except msgspec.ValidationError:
                logger.exception("a message of the front end cannot be read")

    def _take(self, message: Submit | Abort | Stop) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Abort():
                request = self._requests.get(message.request_id)
                if request is not None:
                    self._engine.abort(request)
                    self._forget(request)
            case Stop():
                self._stopping = True

    def _submit(self, message: Submit) -> None:
        try:
            request = self._engine.add_request(message.prompt_ids, message.params, message.attention)
        except ValueError as error:
            self._send(Refused(request_id=message.request_id, message=str(error)))
            return
        self._requests[message.request_id] = request
        self._names[request.request_id] = message.request_id

    def _forget(self, request: Request) -> None:
        self._requests.pop(self._names.pop(request.request_id), None)

    def _report(self, news: Sequence[Progress]) -> None:
        items = []
        for request in (each.request for each in news if each.has_token or each.request.finish_reason):
            if request.request_id in self._names:
                items.append(self._delta(request))
                if request.finish_reason is not None:
                    self._engine.release(request)
                    self._forget(request)
        if items:
            self._send(Deltas(items=items))

    def _delta(self, request: Request) -> Delta:
        failed = request.finish_reason is FinishReason.ERROR
        tokens = [] if failed else [as_token(request.output[-1])]
        is_first = len(request.output) == 1 and not failed
        scores = [as_token(each) if each else None for each in request.prompt_logprobs] if is_first else []
        return Delta(
            request_id=self._names[request.request_id],
            tokens=tokens,
            prompt_logprobs=scores or None,
            finish_reason=request.finish_reason,
            error=request.error,
            timings=timings(request, self._engine) if request.finish_reason else None,
            csa=request.csa.to_json() if is_first and request.csa else None,
        )

    def _ready(self) -> Ready:
        engine = self._engine
        return Ready(
            world=self._world,
            replica=engine.place.replica,
            ranks=list(engine.ranks),
            num_layers=engine.model.num_layers,
            vocab_size=engine.model.vocab_size,
            max_model_len=min(engine.max_model_len, engine.model.max_seq_len),
            max_num_seqs=self._max_num_seqs,
            num_blocks=engine.blocks.config.num_blocks,
            block_size=engine.blocks.config.block_size,
            eos_token_ids=list(engine.model.eos_token_ids),
            policy=self._policy,
        )

    def _tell_state(self) -> None:
        now = time.monotonic()
        if now >= self._ready_due:  # again and again: a front end may have been started anew
            self._ready_due = now + READY_S
            self._tell(self._ready())
        if now < self._stats_due:
            return
        self._stats_due = now + STATS_S
        scheduler, blocks = self._engine.scheduler, self._engine.blocks
        counters, in_step = scheduler.counters, {piece.request_id for piece in self._engine.last_plan.pieces}
        self._tell(
            EngineStats(
                replica=self._engine.place.replica,
                num_waiting=len(scheduler.waiting),
                num_prefilling=len(scheduler.prefilling),
                num_running=len(scheduler.running),
                num_swapped=len(scheduler.swapped),
                num_paused=sum(each.request.request_id not in in_step for each in scheduler.prefilling),
                num_free_blocks=blocks.num_free_blocks,
                num_cached_blocks=blocks.num_cached_blocks,
                num_steps=counters.num_steps,
                num_preemptions=counters.num_preemptions,
                num_pauses=counters.num_pauses,
                prefix_queries=counters.prefix_queries,
                prefix_hits=counters.prefix_hits,
                num_leaked_blocks=self._engine.num_leaked_blocks,
            )
        )

    def _tell(self, message: FromEngine) -> None:
        """State, which may be missed: a front end that is away must not hold up the engine."""
        with contextlib.suppress(zmq.Again):
            self._socket.send(encode(message), zmq.NOBLOCK)

    def _send(self, message: FromEngine) -> None:
        self._socket.send(encode(message))


def as_token(token: SampledToken) -> Token:
    return Token(token.token_id, token.logprob, list(token.top_logprobs))


def timings(request: Request, engine: Engine) -> Timings:
    """Of a finished request."""
    started = request.started_at or request.arrived_at
    times = request.token_times or [started]
    gaps = 1e3 * np.diff(times)
    return Timings(
        queue_ms=1e3 * (started - request.arrived_at),
        prefill_ms=1e3 * (times[0] - started),
        ttft_ms=1e3 * (times[0] - request.arrived_at),
        e2e_ms=1e3 * (time.perf_counter() - request.arrived_at),
        tbt_mean_ms=float(gaps.mean()) if len(gaps) else None,
        tbt_p99_ms=float(np.percentile(gaps, 99)) if len(gaps) else None,
        num_prompt_tokens=request.num_prompt_tokens,
        num_cached_tokens=request.num_cached,
        num_preemptions=request.num_preemptions,
        num_pauses=request.num_pauses,
        sp_size=1 if request.home is not None else engine.blocks.num_ranks,
    )
