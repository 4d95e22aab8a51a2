"""The front end's side of the protocol: requests to the replicas, their news to whoever waits, who is alive.

Knows no HTTP and no text.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

import msgspec
import zmq
import zmq.asyncio

from megatron_sps2.config import AttentionMode, SamplingParams
from megatron_sps2.server.errors import ApiError
from megatron_sps2.server.front_end_config import FrontEndConfig
from megatron_sps2.server.metrics import Metrics
from megatron_sps2.server.protocol import (
    Abort,
    Beat,
    Delta,
    Deltas,
    EngineStats,
    FromEngine,
    Lost,
    Ready,
    Refused,
    Stop,
    Submit,
    ToEngine,
    decode_beat,
    decode_from_engine,
    encode,
    identity,
)

logger = logging.getLogger(__name__)

WATCH_S = 0.2
RETRY_AFTER_S = 5.0


@dataclass(slots=True, eq=False)
class Stream:
    """One request in the engine. `news` ends with a Delta that has a finish_reason, or with an ApiError."""

    request_id: str
    replica: int
    num_prompt_tokens: int
    max_tokens: int
    news: asyncio.Queue[Delta | ApiError] = field(default_factory=asyncio.Queue)
    submitted_at: float = field(default_factory=time.monotonic)
    first_token_at: float | None = None
    num_generated: int = 0


@dataclass(slots=True)
class RankState:
    """The newest beat of a rank, and when it came by this process's clock."""

    beat: Beat
    seen_at: float


class EngineClient:
    """All replicas. States: starting, serving, draining, lost."""

    def __init__(self, config: FrontEndConfig, metrics: Metrics) -> None:
        self._config, self._metrics = config, metrics
        self.state = "starting"
        self.lost_message = ""
        self.lost = asyncio.Event()
        self.replicas: dict[int, Ready] = {}
        self.stats: dict[int, EngineStats] = {}
        self.ranks: dict[int, RankState] = {}
        self.streams: dict[str, Stream] = {}
        self._world, self._past = 0, set[int]()  # the newest that was heard of, and those before it
        # Lost because a rank was silent: it may be heard again, and still run what was failed.
        self._was_silence, self._orphans = False, list[Stream]()
        # An engine that outlives a front end may still answer what that one asked.
        self._me, self._numbers = secrets.token_hex(4), itertools.count()
        context = zmq.asyncio.Context.instance()
        self._engine, self._beats = context.socket(zmq.ROUTER), context.socket(zmq.PULL)
        for socket in (self._engine, self._beats):
            socket.ipv6 = True
        self._engine.bind(config.endpoints.engine)
        self._beats.bind(config.endpoints.beats)

    @property
    def ready(self) -> Ready:
        """What all replicas have in common; ApiError 503 before they serve."""
        if not self.replicas:
            raise self.unavailable()
        return next(iter(self.replicas.values()))

    def unavailable(self) -> ApiError:
        """The answer while the engine does not take requests."""
        says = {
            "starting": "the model is being loaded; try again",
            "draining": "the server is shutting down; ask another one",
            "lost": f"the engine is lost: {self.lost_message}",
        }
        if self.state == "lost" and self._config.outlives_engine:
            says["lost"] += "; it is being started again, try again"
        return ApiError(503, says.get(self.state, "not ready"), retry_after_s=RETRY_AFTER_S)

    def silent_ranks(self) -> dict[int, float]:
        """Ranks that have beaten once and not within the time limit -> seconds of silence."""
        now = time.monotonic()
        ages = {rank: now - state.seen_at for rank, state in self.ranks.items()}
        return {rank: age for rank, age in ages.items() if age > self._config.heartbeat_timeout_s}

    @property
    def is_healthy(self) -> bool:
        """Serving, and every rank has answered within the last seconds."""
        everybody = len(self.ranks) == self._config.world_size
        return self.state == "serving" and everybody and not self.silent_ranks()

    # Requests.

    def check_room(self, count: int) -> None:
        """ApiError 503 while not serving, 429 where `count` more would make the queue too long."""
        if self.state != "serving":
            raise self.unavailable()
        seats = sum(ready.max_num_seqs for ready in self.replicas.values())
        limit = seats + self._config.max_queue
        if len(self.streams) + count > limit:
            self._metrics.refused("queue_full")
            raise ApiError(
                429,
                f"{len(self.streams)} requests run or wait and {count} more would exceed {limit}; try later",
                retry_after_s=self._metrics.seconds_per_request * max(1, len(self.streams) - seats) + 1,
            )

    async def submit(
        self, prompt_ids: Sequence[int], params: SamplingParams, attention: AttentionMode | None
    ) -> Stream:
        """To the replica with the least to do. ApiError 503 where the engine was lost since the room was."""
        if self.state not in ("serving", "draining"):
            raise self.unavailable()
        load = dict.fromkeys(self.replicas, 0)
        for other in self.streams.values():
            load[other.replica] = load.get(other.replica, 0) + other.num_prompt_tokens + other.max_tokens
        replica = min(load, key=lambda each: load[each])
        name = f"{self._me}-{next(self._numbers)}"
        stream = Stream(name, replica, len(prompt_ids), params.max_tokens)
        self.streams[stream.request_id] = stream
        message = Submit(
            request_id=stream.request_id, prompt_ids=list(prompt_ids), params=params, attention=attention
        )
        await self._send(replica, message)
        return stream

    async def abort(self, stream: Stream, reason: str = "abort") -> None:
        """Its blocks are freed on every rank; nothing more comes. Fine for one that has ended."""
        if self.streams.pop(stream.request_id, None):
            self._metrics.ended(stream, reason)
            await self._send(stream.replica, Abort(request_id=stream.request_id))

    def fail_all(self, error: ApiError) -> None:
        """Every waiting request ends with `error`."""
        for stream in self.streams.values():
            stream.news.put_nowait(error)
        self.streams.clear()

    async def stop(self) -> None:
        """Sends all ranks home."""
        for stream in list(self.streams.values()):
            await self.abort(stream)
        for replica in self.replicas:
            await self._send(replica, Stop())

    async def _send(self, replica: int, message: ToEngine) -> None:
        await self._engine.send_multipart([identity(self._world, replica), encode(message)])

    # News.

    async def run(self) -> None:
        """Until cancelled, or lost."""
        async with asyncio.TaskGroup() as tasks:
            for loop in (self._read_engine(), self._read_beats(), self._watch()):
                tasks.create_task(loop)

    async def _read_engine(self) -> None:
        async for sender, *body in _messages(self._engine):
            try:
                message = decode_from_engine(b"".join(body))
            except msgspec.DecodeError:
                logger.exception("a message to the engine's address cannot be read")
                continue
            if isinstance(message, Ready):
                self._enter(message.world)
            if sender.startswith(identity(self._world, 0)[:-1]):
                self._take(message)

    async def _read_beats(self) -> None:
        async for (body,) in _messages(self._beats):
            try:
                message = decode_beat(body)
            except msgspec.DecodeError:
                logger.exception("a message to the address for heartbeats cannot be read")
                continue
            if message.world is not None:
                self._enter(message.world)
            if message.world not in (None, self._world):
                continue
            if isinstance(message, Lost):
                self.lose(message.message)
            else:
                self.ranks[message.rank] = RankState(message, time.monotonic())
                self._metrics.beat(message)
                await self._find_again()

    async def _watch(self) -> None:
        """A rank that is silent for too long is lost; not while this process itself was held up."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(WATCH_S)
            silent = self.silent_ranks() if time.monotonic() - before < 2 * WATCH_S else {}
            if silent and self.state != "lost":
                rank, age = max(silent.items(), key=lambda item: item[1])
                host, pid = self.ranks[rank].beat.host, self.ranks[rank].beat.pid
                self._was_silence, self._orphans = True, list(self.streams.values())
                self.lose(f"rank {rank} (pid {pid} on {host}) has been silent for {age:.1f} s")

    async def _find_again(self) -> None:
        """Ranks that were silent and are heard again, all of them: no other engine will come."""
        everybody = len(self.ranks) == self._config.world_size and not self.silent_ranks()
        if self.state == "lost" and self._was_silence and everybody:
            logger.warning("all ranks are heard again; before: %s", self.lost_message)
            self.state = "serving" if len(self.replicas) == self._config.num_replicas else "starting"
            self.lost_message, self._was_silence = "", False
            self.lost.clear()
            orphans, self._orphans = self._orphans, []
            for stream in orphans:
                await self._send(stream.replica, Abort(request_id=stream.request_id))

    def _enter(self, world: int) -> None:
        """An engine that was not known: it is newer, and what the one before it had is gone."""
        if world == self._world or world in self._past:
            return
        if self._world:
            self._past.add(self._world)
            logger.warning("another engine has come; the one before it: %s", self.lost_message or "ended")
            self.lose("another one has taken its place")
            self._metrics.restarted()
        self._world, self.state, self.lost_message = world, "starting", ""
        self._was_silence, self._orphans = False, []
        self.replicas, self.stats, self.ranks = {}, {}, {}
        self.lost.clear()

    def _take(self, message: FromEngine) -> None:
        match message:
            case Ready():
                self.replicas[message.replica] = message
                if len(self.replicas) == self._config.num_replicas and self.state == "starting":
                    self.state = "serving"
            case EngineStats():
                self.stats[message.replica] = message
                self._metrics.stats(message, self.replicas.get(message.replica))
            case Refused():
                stream = self.streams.pop(message.request_id, None)
                if stream:
                    stream.news.put_nowait(ApiError(400, message.message))
            case Deltas():
                for delta in message.items:
                    self._hand_out(delta)

    def _hand_out(self, delta: Delta) -> None:
        stream = self.streams.get(delta.request_id)
        if stream is None:
            return
        now = time.monotonic()
        if delta.tokens and stream.first_token_at is None:
            stream.first_token_at = now
        stream.num_generated += len(delta.tokens)
        if delta.finish_reason:
            del self.streams[delta.request_id]
        self._metrics.delta(delta, stream)
        stream.news.put_nowait(delta)

    def lose(self, message: str) -> None:
        """Every request hears it; nothing is taken until another engine comes."""
        if self.state != "lost":
            self.state, self.lost_message = "lost", message
            self.fail_all(self.unavailable())
            self.lost.set()


async def _messages(socket: zmq.asyncio.Socket) -> AsyncIterator[list[bytes]]:
    """Each message's frames, with a pause between two: what has come already is received without one.

    Clients, deadlines and aborts would else wait while an engine talks faster than this process reads.
    """
    while True:
        yield await socket.recv_multipart()
        await asyncio.sleep(0)
