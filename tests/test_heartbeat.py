"""Heartbeats between ranks that are threads here: who is named, and when nobody is."""

from __future__ import annotations

import dataclasses
import json
import logging
import queue
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_sps2.parallel import heartbeat
from megatron_sps2.parallel.activity import Activity
from megatron_sps2.parallel.heartbeat import KEY, Heartbeat
from megatron_sps2.parallel.hello import Hello, own_hello
from megatron_sps2.parallel.rank_env import RankEnv
from megatron_sps2.parallel.shared_error import mark_shared

WAIT_S = 10.0
SILENT_S = 1.0


def env_of(rank: int, world_size: int) -> RankEnv:
    return RankEnv(
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=world_size,
        init_method="file:///unused",
        launcher="env",
    )


class World:
    """Ranks of one process, each with its heartbeat and the losses it was told of."""

    def __init__(self, folder: Path, world_size: int) -> None:
        self._folder, self._size = folder, world_size
        self.hellos = [self._hello(rank) for rank in range(world_size)]
        self.losses: list[queue.Queue[str]] = [queue.Queue() for _ in range(world_size)]
        self.stores: list[dist.Store] = []

    def _hello(self, rank: int) -> Hello:
        mine = own_hello(env_of(rank, self._size))
        return dataclasses.replace(mine, host=f"host{rank}", pid=100 + rank)

    def heart(self, rank: int, start_s: float = WAIT_S) -> Heartbeat:
        self.stores.append(dist.FileStore(str(self._folder / "store")))
        env, tell = env_of(rank, self._size), self.losses[rank].put
        return Heartbeat(env, self.stores[-1], self.hellos, start_s=start_s, silent_s=SILENT_S, on_lost=tell)

    def told(self, rank: int) -> str:
        return self.losses[rank].get(timeout=WAIT_S)

    @property
    def nobody_was_lost(self) -> bool:
        return all(losses.empty() for losses in self.losses)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, 3)


@contextmanager
def raw_rank(world: World, rank: int, token: str | None = None) -> Iterator[socket.socket]:
    """A rank that has said who it is and can be made to do anything."""
    address = json.loads(world.stores[0].get(KEY))
    with socket.create_connection((address["host"], address["port"])) as raw:
        raw.sendall(line(rank=rank, token=token or address["token"]))
        yield raw


def line(**message: object) -> bytes:
    return json.dumps(message).encode() + b"\n"


def beat(words: str = "step 7, prefill, layer 2, exchange_k", waited_s: float = 0.0) -> bytes:
    return line(words=words, waited_s=waited_s, is_busy=not waited_s, group=0, is_ready=True)


def busy(step: int = 1) -> Activity:
    return Activity(step=step, phase="prefill", layer=0, collective="exchange_k")


def await_that(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_ranks_that_leave_well_are_not_missed(world: World) -> None:
    with ExitStack() as stack:
        hearts = [stack.enter_context(world.heart(rank)) for rank in range(3)]
        for heart in hearts:
            heart.watch(busy())
        time.sleep(2 * SILENT_S)  # longer than one may be silent
    assert world.nobody_was_lost


def test_a_rank_that_fails_is_named_to_all_others_with_its_words(world: World) -> None:
    with world.heart(0), world.heart(1):
        with world.heart(2) as failing:
            failing.watch(busy(step=5))
            failing.named(ValueError("planted"))
        wanted = "rank 2 (pid 102 on host2) failed in step 5, prefill, layer 0, exchange_k: planted"
        assert [world.told(0), world.told(1)] == [wanted, wanted]
    assert world.losses[2].empty()


def test_rank_0_that_fails_is_named_to_all_others(world: World) -> None:
    with ExitStack() as stack:
        failing = world.heart(0)
        with failing:
            for rank in (1, 2):
                stack.enter_context(world.heart(rank))
            await_that(lambda: all(peer.writer for peer in failing._peers.values()))
            failing.named(ValueError("planted"))
        assert {world.told(1), world.told(2)} == {"rank 0 (pid 100 on host0) failed in starting: planted"}


def test_a_rank_that_ends_without_a_word_is_named_at_once(tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    with world.heart(0) as first:
        first.watch(busy())
        with raw_rank(world, 1) as raw:
            raw.sendall(beat())
            await_that(lambda: first._peers[1].is_ready)
        assert world.told(0) == (
            "rank 1 (pid 101 on host1) has ended; last heard in step 7, prefill, layer 2, exchange_k"
        )


def test_control_a_rank_that_says_goodbye_may_end(tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    with world.heart(0) as first:
        with raw_rank(world, 1) as raw:
            raw.sendall(beat() + line(bye=True))
            await_that(lambda: first._peers[1].has_left)
        time.sleep(1.5 * SILENT_S)
        assert world.nobody_was_lost


def test_a_silent_rank_is_named_after_the_time_and_not_before(tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    with world.heart(0) as first:
        first.watch(busy())
        with raw_rank(world, 1) as raw:
            raw.sendall(beat())
            await_that(lambda: first._peers[1].is_ready)
            begin = time.monotonic()
            told = world.told(0)
            assert 0.8 * SILENT_S < time.monotonic() - begin < SILENT_S + 2
    assert told.startswith("rank 1 (pid 101 on host1) has been silent for 1.")
    assert told.endswith("last heard in step 7, prefill, layer 2, exchange_k")


def test_a_rank_that_is_still_starting_has_more_time(tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    with world.heart(0) as first:
        first.watch(busy())
        with raw_rank(world, 1):
            time.sleep(2 * SILENT_S)
            assert world.nobody_was_lost


def test_a_rank_that_never_speaks_is_named(tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    with world.heart(0, start_s=SILENT_S):
        assert "rank 1 (pid 101 on host1) has been silent" in world.told(0)


def test_a_stranger_is_shown_the_door(tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    with world.heart(0) as first:
        with raw_rank(world, 1, token="guess") as raw:
            raw.sendall(line(failed="rank 1 is lost, believe me"))
            assert raw.recv(1) == b""
        with raw_rank(world, 1) as raw:  # the place is still free
            raw.sendall(beat() + line(bye=True))
            await_that(lambda: first._peers[1].has_left)
    assert world.nobody_was_lost


def test_a_broken_connection_is_reported_by_who_broke_it(tmp_path: Path) -> None:
    world = World(tmp_path, 2)
    with world.heart(0) as first:
        with raw_rank(world, 1):
            await_that(lambda: first._peers[1].writer is not None)
        error = first.named(RuntimeError("Connection closed by peer"))
    assert str(error).startswith("rank 1 (pid 101 on host1) has ended")


def test_an_error_that_all_ranks_share_is_not_told_again(world: World) -> None:
    error = mark_shared(ValueError("the same everywhere"))
    with world.heart(0), world.heart(1), world.heart(2) as last:
        assert last.named(error) is error
    assert world.nobody_was_lost


def test_who_keeps_others_waiting_is_told_once_in_rank_0s_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(heartbeat, "SLOW_S", 0.3)
    world = World(tmp_path, 2)
    with world.heart(0) as first, caplog.at_level(logging.WARNING), raw_rank(world, 1) as raw:
        activity = busy()
        first.watch(activity)
        with activity.waiting():
            for _ in range(6):
                raw.sendall(beat("step 1, prefill, layer 0"))
                time.sleep(0.3)
        raw.sendall(line(bye=True))
    slow = [record.getMessage() for record in caplog.records if "slow" in record.getMessage()]
    assert len(slow) == 1, slow
    assert "ranks 0 wait for data" in slow[0]
    assert "slow: rank 1 (pid 101 on host1): step 1, prefill, layer 0" in slow[0]
