"""Ranks tell each other twice a second that they live, apart from every collective.

A thread in each rank: rank 0 hears all and tells all who was lost. A process that ends closes its connection
and is named at once, one that is stopped or cut off by its silence. Knows no engine and ends no process.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from megatron_sps2.parallel.activity import Activity
from megatron_sps2.parallel.hello import Hello
from megatron_sps2.parallel.rank_env import LOOPBACK, RankEnv
from megatron_sps2.parallel.shared_error import is_shared, mark_told

if TYPE_CHECKING:
    from torch.distributed import Store

logger = logging.getLogger(__name__)

BEAT_S = 0.5
# A rank that waits so long for others' data, and one that keeps it waiting, are told in the log.
SLOW_S = 10.0
# A broken connection and the word of who broke it come apart by less than this.
NAME_S = 1.0
# Before a rank that was told of a loss ends: the lost one's own last line, and its exit code, come first.
AFTER_S = 0.3
FLUSH_S = 0.5
# For a goodbye to get out of a busy host.
LEAVE_S = 5.0
KEY = "sps2/heartbeat"
# What a rank raises when another one ended; anything else is its own mistake.
BROKEN = (RuntimeError, ConnectionError, TimeoutError)

Message = dict[str, Any]
STATE = ("words", "waited_s", "is_busy", "group", "is_ready")  # of a beat


@dataclass(slots=True)
class _Peer:
    """Another rank, as it was heard of last."""

    hello: Hello
    writer: asyncio.StreamWriter | None = None
    seen_at: float = field(default_factory=time.monotonic)
    words: str = "starting"
    waited_s: float = 0.0
    is_busy: bool = False
    group: int = 0
    is_ready: bool = False
    has_left: bool = False


class Heartbeat:
    """`with Heartbeat(...) as heart:` this rank is heard and hears; leaving it well says goodbye.

    on_lost: called once, in the thread of the heartbeat, with the line that names who was lost; it may end
    the process. Other ranks are lost after `start_s` of silence while they start, `silent_s` once `ready`.
    """

    def __init__(
        self,
        env: RankEnv,
        store: Store | None,
        hellos: Sequence[Hello],
        *,
        start_s: float,
        silent_s: float,
        on_lost: Callable[[str], None],
    ) -> None:
        self._env, self._store, self._start_s, self._silent_s = env, store, start_s, silent_s
        self._on_lost, self._is_hub = on_lost, env.rank == 0
        self._me = hellos[env.rank]
        self._own = _Peer(self._me)
        # Rank 0 watches all, the others watch rank 0.
        watched = hellos[1:] if self._is_hub else hellos[:1]
        self._peers = {hello.rank: _Peer(hello) for hello in watched}
        self._activity, self._group, self._is_ready = Activity(), 0, False
        self._named: Exception | None = None
        self._verdict, self._heard = "", threading.Event()
        self._listeners: list[Callable[[str], None]] = []
        self._farewell: Message = {"bye": True}
        self._socket: socket.socket | None = None  # rank 0 listens, the others are connected
        self._address: Message = {}  # of rank 0, with the word by which it knows its ranks
        self._loop = asyncio.new_event_loop() if self._peers else None
        self._closing = asyncio.Event()
        self._is_slow = False
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self.is_leaving = False  # the rank's own thread has an error to report
        self.has_told = False  # the line that names who was lost has been written

    def __enter__(self) -> Heartbeat:
        if self._peers:
            assert self._store is not None, "a world of several ranks has a store"
            if self._is_hub:
                self._socket = self._listen(self._store)
            else:
                self._address = json.loads(self._store.get(KEY))
                self._socket = self._connect()
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and not isinstance(error, Exception):  # Ctrl-C
            self._fail(f"was interrupted in {self._activity.in_words()}")
        if self._loop and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._closing.set)
            self._thread.join(LEAVE_S)

    def watch(self, activity: Activity, group: int = 0) -> None:
        """The engine is up: from now on `activity` says what this rank does.

        `group`: the same for ranks that wait for each other.
        """
        self._activity, self._group, self._is_ready = activity, group, True

    @property
    def loss(self) -> str:
        """The line that names who was lost; "" while nobody was."""
        return self._verdict

    def await_loss(self, seconds: float) -> bool:
        """True as soon as a rank was lost; False after so many seconds without."""
        return self._heard.wait(seconds)

    def when_lost(self, tell: Callable[[str], None]) -> None:
        """`tell` hears of a loss first."""
        self._listeners.append(tell)

    def named(self, error: Exception) -> Exception:
        """What to report: `error`, or who was lost where that is why. The others hear of this rank's own."""
        self.is_leaving = True
        if not self._peers or is_shared(error) or error is self._named:
            return error
        self._named = self._name(error)
        return self._named

    def _name(self, error: Exception) -> Exception:
        if isinstance(error, BROKEN):
            self.await_loss(NAME_S)
        if self._verdict:
            time.sleep(AFTER_S)
            lost = RuntimeError(self._verdict)
            return mark_told(lost) if self.has_told else lost
        self._fail(f"failed in {self._activity.in_words()}: {error}")
        return error

    def _fail(self, how: str) -> None:
        self._farewell = {"failed": f"{self._me.name} {how}"}

    # The thread.

    def _run(self) -> None:
        assert self._loop is not None, "started where there are other ranks"
        with contextlib.closing(self._loop):
            self._loop.run_until_complete(self._talk())

    async def _talk(self) -> None:
        server = None
        if self._is_hub:
            server = await asyncio.start_server(self._hear_spoke, sock=self._socket)
        else:
            reader = await self._greet()
            self._hearing = asyncio.create_task(self._hear(self._peers[0], reader))
        await self._beat()
        self._send(self._farewell)
        await self._flush()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if server:
            server.close()

    async def _beat(self) -> None:
        """Until this rank leaves."""
        while not self._closing.is_set():
            before = time.monotonic()
            state = self._state()
            self._send(state)
            self._note(self._own, state)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closing.wait(), BEAT_S)
            if time.monotonic() - before > 4 * BEAT_S:
                self._forgive()  # This process was stopped itself: it has heard nobody.
            self._look_for_silence()
            if self._is_hub:
                self._look_for_slowness()

    def _state(self) -> Message:
        activity = self._activity
        return {
            "words": activity.in_words(),
            "waited_s": activity.waited_s,
            "is_busy": activity.is_busy,
            "group": self._group,
            "is_ready": self._is_ready,
        }

    def _forgive(self) -> None:
        for peer in self._peers.values():
            peer.seen_at = time.monotonic()

    def _look_for_silence(self) -> None:
        for peer in self._peers.values():
            limit = self._silent_s if peer.is_ready and self._is_ready else max(self._start_s, self._silent_s)
            age = time.monotonic() - peer.seen_at
            if not peer.has_left and age > limit:
                self._lose(f"{peer.hello.name} has been silent for {age:.1f} s; last heard in {peer.words}")

    def _look_for_slowness(self) -> None:
        """Who keeps others waiting; told once."""
        ranks = [self._own, *(peer for peer in self._peers.values() if not peer.has_left)]
        waiting = [peer.hello.rank for peer in ranks if peer.waited_s > SLOW_S]
        groups = {peer.group for peer in ranks if peer.waited_s > SLOW_S}
        slow = (peer for peer in ranks if peer.is_busy and peer.group in groups)
        busy = [f"{peer.hello.name}: {peer.words}" for peer in slow]
        if waiting and busy and not self._is_slow:
            names = ", ".join(map(str, waiting[:8]))
            logger.warning("ranks %s wait for data for %g s; slow: %s", names, SLOW_S, "; ".join(busy[:8]))
        self._is_slow = bool(waiting)

    def _lose(self, message: str) -> None:
        if self._verdict or self._closing.is_set():
            return
        self._verdict = message
        if self._is_hub:
            self._send({"lost": message})
        self._heard.set()
        threading.Thread(target=self._tell, args=(message,), name="loss", daemon=True).start()

    def _tell(self, message: str) -> None:
        try:
            for tell in self._listeners:
                tell(message)
        finally:
            self._on_lost(message)

    # Messages: a line of JSON each.

    def _send(self, message: Message) -> None:
        line = json.dumps(message).encode() + b"\n"
        for peer in self._peers.values():
            if peer.writer and not peer.has_left:
                peer.writer.write(line)

    async def _flush(self) -> None:
        writers = [peer.writer for peer in self._peers.values() if peer.writer]
        for writer in writers:
            writer.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_S):
                await asyncio.gather(*(each.wait_closed() for each in writers), return_exceptions=True)

    async def _hear(self, peer: _Peer, reader: asyncio.StreamReader) -> None:
        """Until it leaves, or ends."""
        with contextlib.suppress(OSError, ValueError):  # a connection that breaks has ended
            while line := await reader.readline():
                self._take(peer, json.loads(line))
        if not peer.has_left:
            self._lose(f"{peer.hello.name} has ended; last heard in {peer.words}")

    def _note(self, peer: _Peer, state: Message) -> None:
        for name in STATE:
            setattr(peer, name, state[name])

    def _take(self, peer: _Peer, message: Message) -> None:
        peer.seen_at = time.monotonic()
        if "words" in message:
            self._note(peer, message)
        elif told := message.get("failed") or message.get("lost"):
            peer.has_left = "failed" in message
            self._lose(told)
        else:
            peer.has_left = True

    # Rank 0.

    def _listen(self, store: Store) -> socket.socket:
        """Where the others connect, told through the store."""
        host = urlsplit(self._env.init_method).hostname or LOOPBACK[1]
        if host in LOOPBACK or not socket.has_dualstack_ipv6():
            here, family = (host, socket.AF_INET6) if ":" in host else (host, socket.AF_INET)
            here = here if host in LOOPBACK else ""
            listener = socket.create_server((here, 0), family=family, backlog=1024)
        else:
            listener = socket.create_server(
                ("", 0), family=socket.AF_INET6, backlog=1024, dualstack_ipv6=True
            )
        self._address = {"host": host, "port": listener.getsockname()[1], "token": secrets.token_hex(16)}
        store.set(KEY, json.dumps(self._address))
        return listener

    async def _hear_spoke(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            first = json.loads(await reader.readline())
            peer = self._peers[first["rank"]] if first["token"] == self._address["token"] else None
            if peer and not peer.writer:
                peer.writer = writer
                await self._hear(peer, reader)
                return
        writer.close()

    # The others.

    def _connect(self) -> socket.socket:
        try:
            return socket.create_connection((self._address["host"], self._address["port"]), self._start_s)
        except OSError as error:
            name, reason = self._peers[0].hello.name, error.strerror or str(error)
            raise RuntimeError(
                f"{name} cannot be reached at {self._address['host']}:{self._address['port']} ({reason}); "
                "ranks need every port of rank 0's host"
            ) from error

    async def _greet(self) -> asyncio.StreamReader:
        assert self._socket is not None, "connected when it was entered"
        self._socket.setblocking(False)
        reader, writer = await asyncio.open_connection(sock=self._socket)
        hello = {"rank": self._me.rank, "token": self._address["token"]}
        writer.write(json.dumps(hello).encode() + b"\n")
        self._peers[0].writer = writer
        return reader
