"""The local spawner: ranks that end well, fail, die and are interrupted, each case a program of its own."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_sps2.parallel.local_world import run_local_world

PROGRAM = Path(__file__).with_name("local_world_program.py")
# Starting the forkserver imports torch, which takes seconds on a busy machine.
START_S = 90
# A dead rank must be noticed within this time, measured from its death.
NOTICE_S = 30


def environ(**extra: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("SPS2_")}
    return inherited | {"PYTHONPATH": str(PROGRAM.parent.parent)} | extra


def run(case: str, *args: str, stdin: str = "", **extra: str) -> subprocess.CompletedProcess[str]:
    command: Sequence[str] = (sys.executable, str(PROGRAM), case, *args)
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=START_S + NOTICE_S, env=environ(**extra)
    )


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


def wait_until_dead(pids: list[int], seconds: float) -> list[int]:
    """The pids that still live after at most `seconds`."""
    end = time.monotonic() + seconds
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < end:
        time.sleep(0.1)
    return left


def started(case: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A running program and the pids of its two ranks, once both are in their target."""
    program = subprocess.Popen(
        (sys.executable, str(PROGRAM), case),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ(),
    )
    assert program.stdout is not None
    return program, [int(program.stdout.readline().split()[1]) for _ in range(2)]


def test_a_world_of_none_is_refused() -> None:
    with pytest.raises(ValueError, match="world_size=0 must be at least 1"):
        run_local_world(0, print)


def test_the_supervisor_does_not_import_torch() -> None:
    code = "import sys, megatron_sps2.parallel.local_world; sys.exit('torch' in sys.modules)"
    assert subprocess.run((sys.executable, "-c", code), env=environ(), timeout=START_S).returncode == 0


def test_ranks_find_each_other_and_end_well() -> None:
    done = run("sum")
    assert done.returncode == 0, done.stderr
    # 1 + 2 over ranks 0 and 1: each rank's own number plus one, summed by gloo.
    assert sorted(done.stdout.split("\n")) == ["", "rank 0 of 2 sum 3", "rank 1 of 2 sum 3"]
    assert done.stderr == ""


def test_control_a_sum_without_the_exchange_differs() -> None:
    done = run("no-sum")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == ["", "rank 0 of 2 sum 1", "rank 1 of 2 sum 2"]


def test_rank_0_reads_the_terminal_and_the_others_do_not() -> None:
    done = run("read", stdin="hello\nworld\n")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.split("\n")) == ["", "rank 0 read 'hello'", "rank 1 read ''"]


def test_threads_are_shared_out_and_the_users_choice_stays() -> None:
    chosen = run("threads", OMP_NUM_THREADS="3", GLOO_SOCKET_IFNAME="eth7").stdout
    assert sorted(chosen.split("\n")) == ["", "rank 0 threads 3 3 eth7", "rank 1 threads 3 3 eth7"]


def test_a_rank_that_raises_is_named() -> None:
    done = run("raise")
    assert done.returncode == 1
    assert "ValueError: rank 1 cannot go on" in done.stderr
    assert "rank 1 (pid " in done.stderr and "exited with code 1" in done.stderr


def test_an_exit_code_is_passed_on() -> None:
    done = run("exit-7")
    assert done.returncode == 7
    assert "rank 0 (pid " in done.stderr and "exited with code 7" in done.stderr


def test_a_rank_that_is_killed_ends_one_that_waits_for_it() -> None:
    begin = time.monotonic()
    done = run("kill")
    took = time.monotonic() - begin
    assert done.returncode == 128 + signal.SIGKILL
    assert "rank 1 (pid " in done.stderr and "was killed by SIGKILL" in done.stderr
    # The program prints when rank 1 dies; the whole run includes the start.
    died = float(done.stdout.split("died at ")[1].split()[0])
    assert begin + took - died < NOTICE_S


def test_a_rank_that_ignores_everything_is_killed() -> None:
    done = run("stubborn")
    assert done.returncode == 1
    pid = int(done.stdout.split("pid ")[1].split()[0])
    assert wait_until_dead([pid], 5) == []


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_all_ranks(signum: signal.Signals) -> None:
    program, ranks = started("wait")
    program.send_signal(signum)
    assert program.wait(timeout=NOTICE_S) == 128 + signum
    assert wait_until_dead(ranks, 5) == []


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_rank_outlives_a_killed_supervisor() -> None:
    program, ranks = started("wait")
    assert [alive(pid) for pid in ranks] == [True, True]
    program.kill()
    program.wait(timeout=NOTICE_S)
    assert wait_until_dead(ranks, 10) == []
