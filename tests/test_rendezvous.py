"""How a world comes together, and what each way of not coming together says."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_sps2.parallel.hello import Hello, own_hello
from megatron_sps2.parallel.rank_env import RankEnv
from megatron_sps2.parallel.rendezvous import meet, open_store
from tests.sps2_command import ROOT, SPS2, environ, make_checkpoint, write_ids

TIMEOUT_S = 20.0
# Until one process has imported torch and said what is wrong.
START_S = 60


def env_of(rank: int, world_size: int = 2, method: str = "file://unused") -> RankEnv:
    return RankEnv(
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=world_size,
        init_method=method,
        launcher="env",
    )


Change = Callable[[Hello], Hello]


def meet_all(
    folder: Path, *ranks: RankEnv, timeout_s: float = TIMEOUT_S, changes: dict[int, Change] | None = None
) -> list[Any]:
    """Of each rank, in threads: its Hellos, or the error."""

    def run(env: RankEnv) -> Any:
        store = dist.FileStore(str(folder / "store"))
        hello = (changes or {}).get(env.rank, lambda same: same)(own_hello(env))
        try:
            return meet(env, store, hello, timeout_s)
        except RuntimeError as error:
            return error

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(run, ranks))


def test_all_ranks_learn_of_all(tmp_path: Path) -> None:
    found = meet_all(tmp_path, *(env_of(rank, 3) for rank in range(3)))
    assert found[0] == found[1] == found[2]
    assert [hello.rank for hello in found[0]] == [0, 1, 2]
    assert {(hello.pid, hello.host) for hello in found[0]} == {(os.getpid(), socket.gethostname())}


def test_one_that_does_not_come_is_named_within_the_time(tmp_path: Path) -> None:
    begin = time.monotonic()
    found = meet_all(tmp_path, env_of(0, 4), env_of(2, 4), timeout_s=1)
    assert time.monotonic() - begin < 5
    wanted = f"ranks 1, 3 of 4 did not come within 1 s; here: {socket.gethostname()}: 0, 2; start the missing"
    assert all(str(error).startswith(wanted) for error in found), found


def test_control_one_that_comes_late_is_in_time(tmp_path: Path) -> None:
    def late(hello: Hello) -> Hello:
        time.sleep(0.7)
        return hello

    found = meet_all(tmp_path, env_of(0), env_of(1), timeout_s=10, changes={1: late})
    assert [len(hellos) for hellos in found] == [2, 2]


def test_rank_0_that_does_not_come_is_named_by_the_others(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("megatron_sps2.parallel.rendezvous.GRACE_S", 0.5)
        found = meet_all(tmp_path, env_of(1), timeout_s=0.5)
    assert "rank 0 did not come within 1 s" in str(found[0])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"world_size": 4}, "was started for world_size=4, rank 0"),
        ({"job": "77"}, "is of job '77', rank 0"),
        ({"versions": {"megatron_sps2": "0.0.1"}}, "has megatron_sps2 0.0.1, rank 0"),
    ],
)
def test_a_rank_that_differs_is_named_on_all(tmp_path: Path, change: dict[str, Any], complaint: str) -> None:
    changes = {1: lambda hello: dataclasses.replace(hello, **change)}
    found = meet_all(tmp_path, env_of(0), env_of(1), changes=changes)
    assert [str(error).startswith("rank 1 (pid") and complaint in str(error) for error in found] == [True] * 2
    assert all(error.shared_by_all_ranks for error in found)  # rank 0 alone will print it


def test_the_second_who_claims_a_place_is_refused_and_the_first_is_not_disturbed(tmp_path: Path) -> None:
    pair = meet_all(tmp_path, env_of(0), env_of(1))
    late = meet_all(tmp_path, env_of(1))
    assert len(pair[0]) == len(pair[1]) == 2
    assert "rank 1 is taken" in str(late[0]) and "its own MASTER_PORT" in str(late[0])


# Addresses.


@pytest.fixture
def listener() -> Any:
    """Somebody else's port: takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def port_of(server: socket.socket) -> int:
    return int(server.getsockname()[1])


def test_a_port_in_use_is_named_on_rank_0(listener: socket.socket) -> None:
    env = env_of(0, method=f"tcp://127.0.0.1:{port_of(listener)}")
    with pytest.raises(RuntimeError, match=rf"port {port_of(listener)} is taken .* another MASTER_PORT"):
        open_store(env, TIMEOUT_S)


def test_somebody_else_at_the_port_is_not_waited_for_for_ever(listener: socket.socket) -> None:
    env = env_of(1, method=f"tcp://127.0.0.1:{port_of(listener)}")
    with pytest.raises(RuntimeError, match="is not rank 0 of this job: no answer within 1 s"):
        open_store(env, 1.0)


def test_an_address_where_nobody_answers_is_named(listener: socket.socket) -> None:
    env = env_of(1, method=f"tcp://127.0.0.1:{port_of(listener)}")
    listener.close()
    with pytest.raises(RuntimeError, match=r"rank 0 does not answer at .* within 1 s \(Connection refused\)"):
        open_store(env, 1.0)


# The command.


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    folder = tmp_path_factory.mktemp("rendezvous")
    checkpoint = make_checkpoint(folder)
    ids = write_ids(folder / "ids.json", range(5, 25))
    return ("generate", "--checkpoint", checkpoint, "--sp", 2, "--prompt-ids", ids)


def start(*command: object, port: int, rank: int = 0, **extra: str) -> subprocess.Popen[str]:
    world = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return subprocess.Popen(
        tuple(map(str, (*SPS2, *command))),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environ(**world, **extra),
    )


def ended(run: subprocess.Popen[str]) -> str:
    """Its stderr; it has failed and said nothing on stdout."""
    out, err = run.communicate(timeout=START_S)
    assert (run.returncode, out) == (1, ""), (out, err)
    return err


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return port_of(server)


def test_a_node_that_never_comes_is_one_line(flags: tuple[object, ...]) -> None:
    err = ended(start(*flags, "--rendezvous-timeout-s", 1, port=free_port()))
    assert err.startswith("sps2: error: rank 1 of 2 did not come within 1 s; here: "), err
    assert err.count("\n") == 1


def test_a_taken_port_is_one_line(flags: tuple[object, ...], listener: socket.socket) -> None:
    err = ended(start(*flags, port=port_of(listener)))
    assert f"sps2: error: [rank 0 of 2] port {port_of(listener)} is taken on " in err
    assert err.count("\n") == 1, err


def test_a_rank_with_another_version_is_one_line_on_rank_0(flags: tuple[object, ...], tmp_path: Path) -> None:
    fake = tmp_path / "megatron_core-0.1.dist-info"
    fake.mkdir()
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: megatron-core\nVersion: 0.1\n")
    port = free_port()
    first = start(*flags, port=port)
    second = start(*flags, port=port, rank=1, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert "has megatron-core 0.1, rank 0" in ended(first)
    assert ended(second) == ""


def test_two_jobs_on_one_port_are_told_apart(flags: tuple[object, ...]) -> None:
    """The second job's rank 0 finds the port taken and says so; the first job ends well."""
    port = free_port()
    first = [start(*flags, "--max-tokens", 4, port=port)]
    wait_for(port)
    intruders = [start(*flags, port=port, rank=0)]
    assert f"port {port} is taken" in ended(intruders[0])
    first.append(start(*flags, "--max-tokens", 4, port=port, rank=1))
    assert [run.wait(timeout=START_S) for run in first] == [0, 0]


def wait_for(port: int) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise AssertionError(f"nobody listens on {port}")
