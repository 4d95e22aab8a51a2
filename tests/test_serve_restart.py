"""A front end that outlives its engine: 503 with Retry-After meanwhile, and the same answers afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from benchmarks.served import Server, kill_family, serve
from megatron_sps2.cli.front_end import restarts_left
from tests.restarting import ask, await_answer, await_loss, free_pair, front_end, rank_of
from tests.sps2_command import ROOT, SPS2, environ, make_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

ENDED_S = 30.0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("restart"))


def test_local_ranks_come_back_as_often_as_they_may(checkpoint: Path) -> None:
    with serve(checkpoint, "--sp", 2, "--max-restarts", 1) as server:
        wanted = ask(server)[1]
        victim = rank_of(server, 1)
        victim.kill()
        await_loss(server)
        assert await_answer(server) == wanted
        assert server.metric("sps2:engine_restarts_total") == 1
        assert rank_of(server, 1).pid != victim.pid
        rank_of(server, 0).kill()
        assert server.process.wait(ENDED_S) not in (0, None)
        log = server.log.read_text()
        assert f"sps2: rank 1 (pid {victim.pid}) was killed by SIGKILL; ending the others" in log
        assert log.count("starting the ranks again (1 of 1)") == 1


def records() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob(f"sps2-front-end-{os.getuid()}-*.json"))


def test_torchrun_starts_the_ranks_again_and_they_find_their_front_end(checkpoint: Path) -> None:
    launcher = ("bash", str(ROOT / "launch" / "torchrun.sh"))
    extra = environ(NPROC="2", MAX_RESTARTS="1")
    with serve(checkpoint, "--sp", 2, command=launcher, **extra) as server:
        wanted, front_ends = ask(server)[1], listeners(server)
        assert len(records()) >= 1
        rank_of(server, 0).kill()
        await_loss(server)
        assert await_answer(server) == wanted
        assert listeners(server) == front_ends and len(front_ends) == 1
        assert psutil.Process(*front_ends).cpu_affinity() == psutil.Process().cpu_affinity()
        assert rank_of(server, 0).cpu_affinity() != rank_of(server, 1).cpu_affinity()
        mine = [path for path in records() if json.loads(path.read_text())["pid"] in front_ends]
        assert len(mine) == 1
        # A drain, though torchrun sends the signal to all: the answer under way comes whole.
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(ENDED_S) == 1  # torchrun's, for every signal
        assert psutil.wait_procs([psutil.Process(p) for p in front_ends if psutil.pid_exists(p)], 10)[1] == []
        assert not mine[0].exists()


def listeners(server: Server) -> set[int]:
    """The processes that listen at the server's port."""
    port = int(server.base_url.rpartition(":")[2])
    connections = psutil.net_connections("tcp")
    return {c.pid for c in connections if c.status == "LISTEN" and c.laddr.port == port and c.pid}


@contextmanager
def engine(checkpoint: Path, address: str, log: Path) -> Iterator[subprocess.Popen[str]]:
    """Two ranks for a front end elsewhere."""
    flags = ("serve", "--checkpoint", str(checkpoint), "--sp", "2", "--role", "engine")
    with log.open("a") as err:
        command = (*SPS2, *flags, "--engine-address", address)
        process = subprocess.Popen(command, stderr=err, text=True, env=environ(), cwd=ROOT)
    try:
        yield process
    finally:
        kill_family(process)


def test_a_front_end_by_itself_serves_one_job_after_another(checkpoint: Path, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_pair()}"
    with front_end(checkpoint, address, tmp_path) as server:
        assert ask(server)[0] == 503 and server.get("/health")[0] == 503
        with engine(checkpoint, address, tmp_path / "first"):
            wanted = await_answer(server)
            rank_of(server, 1).kill()
            await_loss(server)
            assert "rank 1" in ask(server)[1]
        with engine(checkpoint, address, tmp_path / "second") as second:
            assert await_answer(server) == wanted
            assert server.metric("sps2:engine_restarts_total") == 1
            assert server.end() == 0
            assert second.wait(ENDED_S) == 0


@pytest.mark.parametrize(
    ("environ", "left"),
    [
        ({}, False),
        ({"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0"}, False),
        ({"TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "2"}, True),
        ({"TORCHELASTIC_RESTART_COUNT": "2", "TORCHELASTIC_MAX_RESTARTS": "2"}, False),
    ],
)
def test_restarts_are_counted_as_torchrun_does(environ: dict[str, str], left: bool) -> None:
    assert restarts_left(environ) == left


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--role", "engine"), "find each other at --engine-address HOST:PORT"),
        (("--engine-address", "a:1"), "--role all needs none"),
        (("--role", "engine", "--engine-address", "host"), "must be HOST:PORT with a port in 1..65534"),
        (("--max-restarts", "-1"), "--max-restarts -1 must be 0 (none) or above"),
    ],
)
def test_roles_and_restarts_that_do_not_fit_are_refused(
    checkpoint: Path, flags: tuple[str, ...], complaint: str
) -> None:
    command = (*SPS2, "serve", "--checkpoint", str(checkpoint), *flags)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=environ(), cwd=ROOT)
    assert done.returncode == 2 and complaint in done.stderr and done.stderr.count("\n") == 1, done.stderr
