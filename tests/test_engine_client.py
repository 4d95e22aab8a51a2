"""The front end's view of its engine: losses, silence, another engine, and what nobody can read. No ranks."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
import zmq.asyncio

from megatron_sps2.config import SamplingParams
from megatron_sps2.server import engine_client
from megatron_sps2.server.engine_client import EngineClient
from megatron_sps2.server.errors import ApiError
from megatron_sps2.server.front_end_config import FrontEndConfig
from megatron_sps2.server.leader import Leader
from megatron_sps2.server.metrics import Metrics
from megatron_sps2.server.protocol import (
    Abort,
    Beat,
    Delta,
    Deltas,
    Endpoints,
    Lost,
    Ready,
    Submit,
    Token,
    decode_to_engine,
    encode,
    identity,
)

SILENT_S = 0.5
WAIT_S = 10.0
NUM_TALKED = 400
OLD, NEW = 77, 5  # numbers of worlds say nothing about their order


def beat(world: int, rank: int = 0) -> Beat:
    return Beat(
        world=world,
        rank=rank,
        replica=0,
        sp_rank=rank,
        tp_rank=0,
        host="host",
        pid=100 + rank,
        time=0.0,
        num_used_blocks=0,
        bytes_sent={},
        rss_bytes=0,
        peak_bytes=0,
        steps=[],
    )


def ready(world: int) -> Ready:
    return Ready(
        world=world,
        replica=0,
        ranks=[0],
        num_layers=1,
        vocab_size=9,
        max_model_len=99,
        max_num_seqs=4,
        num_blocks=9,
        block_size=4,
        eos_token_ids=[],
        policy="sps2",
    )


class Engine:
    """A leader's and a rank's sockets of one world, moved by hand."""

    def __init__(self, endpoints: Endpoints, world: int) -> None:
        self.world = world
        context = zmq.asyncio.Context.instance()
        self.leader, self.beats = context.socket(zmq.DEALER), context.socket(zmq.PUSH)
        self.leader.setsockopt(zmq.IDENTITY, identity(world, 0))
        for socket, address in ((self.leader, endpoints.engine), (self.beats, endpoints.beats)):
            socket.linger = 0
            socket.connect(address)

    async def serve(self) -> None:
        await self.beats.send(encode(beat(self.world)))
        await self.leader.send(encode(ready(self.world)))

    async def received(self) -> Any:
        return decode_to_engine(await asyncio.wait_for(self.leader.recv(), WAIT_S))

    async def answer(self, request_id: str) -> None:
        delta = Delta(request_id=request_id, tokens=[Token(3)], finish_reason="length")
        await self.leader.send(encode(Deltas(items=[delta])))

    def close(self) -> None:
        self.leader.close(0)
        self.beats.close(0)


class Desk:
    """A client that runs, and the engines of a test."""

    def __init__(self, folder: Path) -> None:
        self.endpoints = Endpoints(engine=f"ipc://{folder}/engine", beats=f"ipc://{folder}/beats")
        config = FrontEndConfig(
            host="",
            port=0,
            endpoints=self.endpoints,
            checkpoint="",
            served_model_name="m",
            heartbeat_timeout_s=SILENT_S,
            outlives_engine=True,
        )
        self.client = EngineClient(config, Metrics("m"))
        self.engines: list[Engine] = []

    def engine(self, world: int) -> Engine:
        self.engines.append(Engine(self.endpoints, world))
        return self.engines[-1]

    async def serving(self, world: int) -> Engine:
        engine = self.engine(world)
        await engine.serve()
        await self.until(lambda: self.client.state == "serving")
        return engine

    async def until(self, reached: Callable[[], bool]) -> None:
        end = time.monotonic() + WAIT_S
        while not reached():
            assert time.monotonic() < end, self.client.state
            await asyncio.sleep(0.01)

    async def submit(self) -> Any:
        return await self.client.submit([1, 2], SamplingParams(max_tokens=1), None)


@asynccontextmanager
async def desk(folder: Path) -> AsyncIterator[Desk]:
    made = Desk(folder)
    running = asyncio.create_task(made.client.run())
    try:
        yield made
        assert not running.done(), running
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        for socket in (made.client._engine, made.client._beats):
            socket.close(0)
        for engine in made.engines:
            engine.close()


def run(folder: Path, play: Callable[[Desk], Awaitable[None]]) -> None:
    async def main() -> None:
        async with desk(folder) as made:
            await play(made)

    asyncio.run(main())


def test_a_loss_while_the_model_loads_is_heard(tmp_path: Path) -> None:
    async def play(desk: Desk) -> None:
        await desk.engine(OLD).beats.send(encode(Lost(message="rank 0: no memory", world=OLD)))
        await desk.until(lambda: desk.client.state == "lost")
        assert desk.client.lost_message == "rank 0: no memory"

    run(tmp_path, play)


def test_another_engine_takes_the_place_of_one_and_that_one_is_heard_no_more(tmp_path: Path) -> None:
    async def play(desk: Desk) -> None:
        old = await desk.serving(OLD)
        stream = await desk.submit()
        assert isinstance(await old.received(), Submit)
        new = desk.engine(NEW)
        await new.serve()
        error = await asyncio.wait_for(stream.news.get(), WAIT_S)
        assert isinstance(error, ApiError) and error.status == 503
        await desk.until(lambda: desk.client.state == "serving")
        await old.beats.send(encode(Lost(message="old", world=OLD)))
        await old.leader.send(encode(ready(OLD)))
        second = await desk.submit()
        assert (await new.received()).request_id == second.request_id
        await old.answer(second.request_id)
        await new.answer(second.request_id)
        assert (await asyncio.wait_for(second.news.get(), WAIT_S)).tokens == [Token(3)]
        assert desk.client.state == "serving" and second.news.empty()

    run(tmp_path, play)


def test_silence_that_ends_is_forgiven_and_what_it_failed_is_aborted(tmp_path: Path) -> None:
    async def play(desk: Desk) -> None:
        engine = await desk.serving(OLD)
        stream = await desk.submit()
        assert isinstance(await engine.received(), Submit)
        error = await asyncio.wait_for(stream.news.get(), WAIT_S)
        assert isinstance(error, ApiError) and "rank 0 (pid 100 on host) has been silent" in error.message
        await engine.beats.send(encode(beat(OLD)))
        await desk.until(lambda: desk.client.state == "serving")
        assert await engine.received() == Abort(request_id=stream.request_id)
        desk.client.check_room(1)

    run(tmp_path, play)


def test_an_engine_that_talks_without_a_pause_keeps_nobody_waiting(tmp_path: Path) -> None:
    """What has come already is taken in turns with everything else that the front end does."""

    async def play(desk: Desk) -> None:
        engine = await desk.serving(OLD)
        stream = await desk.submit()
        tokens = Deltas(items=[Delta(request_id=stream.request_id, tokens=[Token(3)])])
        for _ in range(NUM_TALKED):
            await engine.leader.send(encode(tokens))
            await engine.beats.send(encode(beat(OLD)))
        time.sleep(0.3)  # all of it lies in the sockets
        begun, turns = stream.num_generated, 0
        while stream.num_generated < NUM_TALKED:
            await asyncio.sleep(0)
            turns += 1
        assert turns >= (NUM_TALKED - begun) / 2, (turns, begun)

    run(tmp_path, play)


def test_control_a_rank_that_was_killed_is_not_forgiven(tmp_path: Path) -> None:
    async def play(desk: Desk) -> None:
        engine = await desk.serving(OLD)
        await engine.beats.send(encode(Lost(message="rank 1 was killed", world=OLD)))
        await desk.until(lambda: desk.client.state == "lost")
        await engine.serve()
        await asyncio.sleep(3 * engine_client.WATCH_S)
        assert desk.client.state == "lost"

    run(tmp_path, play)


def test_what_cannot_be_read_ends_nothing(tmp_path: Path) -> None:
    async def play(desk: Desk) -> None:
        stranger = desk.engine(NEW)
        await stranger.beats.send(b"\x81")
        await stranger.leader.send(b"\x81")
        await stranger.leader.send_multipart([b"a", b"b", b"c"])
        await desk.serving(OLD)

    run(tmp_path, play)


def test_a_request_that_comes_just_as_the_engine_is_lost_is_told(tmp_path: Path) -> None:
    """Its room was checked before, its text became tokens meanwhile."""

    async def play(desk: Desk) -> None:
        await desk.serving(OLD)
        desk.client.check_room(1)
        desk.client.lose("rank 1 was killed")
        with pytest.raises(ApiError, match="rank 1 was killed"):
            await desk.submit()
        assert not desk.client.streams

    run(tmp_path, play)


def test_a_leader_whose_front_end_is_away_is_not_held_up(tmp_path: Path) -> None:
    engine: Any = SimpleNamespace(place=SimpleNamespace(replica=0))
    where = f"ipc://{tmp_path}/nobody"
    leader = Leader(engine, where, world=OLD, idle_step_s=1, max_num_seqs=1, policy="sps2")

    def tell() -> None:
        for _ in range(3000):  # more than a socket queues
            leader._tell(ready(OLD))

    telling = threading.Thread(target=tell, daemon=True)
    telling.start()
    telling.join(WAIT_S)
    assert not telling.is_alive()
    leader._socket.close(0)
