"""What users and machines do wrong: each a real run that ends soon, with one clear line and an exit code."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.planted_error import PLANTED
from tests.sps2_command import MAX_SEQ_LEN, ROOT, SPS2, environ, make_checkpoint, sps2, words, write_ids

# From a mistake or a death to the end of the run.
NOTICE_S = 30
# Until ranks run: imports, rendezvous, weights; much longer on a busy machine.
START_S = 150


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """9 query heads, 3 KV heads: tp 1 or 3."""
    return make_checkpoint(tmp_path_factory.mktemp("failures"))


@pytest.fixture(scope="module")
def ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prompt that is fine."""
    return write_ids(tmp_path_factory.mktemp("ids") / "ids.json", range(5, 25))


def assert_refused(done: subprocess.CompletedProcess[str], *complaints: str) -> None:
    """Exit code 2, nothing on stdout, one line on stderr that holds all `complaints`."""
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.startswith("sps2: error: ") and done.stderr.count("\n") == 1, done.stderr
    for complaint in complaints:
        assert complaint in done.stderr


# Flags, prompts and checkpoints.


@pytest.mark.parametrize(
    ("flags", "complaints"),
    [
        (("--tp", "2"), ("tp_size=2 does not divide num_attention_heads=9", "use --tp 1 or 3")),
        (("--sp", "0"), ("sp_size=0 must be at least 1",)),
        (("--sp", "2", "--max-model-len", "99999"), ("99999", f"1..{MAX_SEQ_LEN}")),
        (("--temperature", "-1"), ("temperature=-1.0 must be 0 (greedy) or above",)),
        (("--timeout-s", "0"), ("--timeout-s 0.0",)),
        (("--strategy", "ulysses", "--sp", "10"), ("sp_size=10", "9")),
        (("--strategy", "ulysses", "--sp", "4", "--tp", "3"), ("sp_size=4", "3")),
        (("--chat",), ("--chat wraps a text", "use one of them")),
    ],
)
def test_flags_that_do_not_fit_are_refused_before_a_rank_starts(
    checkpoint: Path, ids: Path, flags: tuple[str, ...], complaints: tuple[str, ...]
) -> None:
    begin = time.monotonic()
    done = sps2("generate", "--checkpoint", checkpoint, "--prompt-ids", ids, *flags, "--json")
    assert_refused(done, *complaints)
    assert time.monotonic() - begin < NOTICE_S


def test_an_empty_prompt_is_refused_by_one_line_of_two_ranks(checkpoint: Path, tmp_path: Path) -> None:
    empty = write_ids(tmp_path / "ids.json", [])
    done = sps2("generate", "--checkpoint", checkpoint, "--sp", 2, "--prompt-ids", empty, "--json")
    assert_refused(done, "the prompt is empty (0 tokens); give at least one token")


def test_a_prompt_file_without_a_name_is_refused(checkpoint: Path) -> None:
    done = sps2("generate", "--checkpoint", checkpoint, "--prompt-file", "", stdin="w5 w6")
    assert_refused(done, "file is empty", "- for stdin")


def test_a_prompt_longer_than_the_model_allows_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    long = write_ids(tmp_path / "ids.json", [5] * (MAX_SEQ_LEN + 1))
    done = sps2("generate", "--checkpoint", checkpoint, "--prompt-ids", long, "--max-tokens", 3)
    assert_refused(done, f"{MAX_SEQ_LEN + 1} tokens", f"exceeds {MAX_SEQ_LEN}", "shorten the prompt")


def test_an_unknown_token_id_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    unknown = write_ids(tmp_path / "ids.json", [5, 251])
    done = sps2("generate", "--checkpoint", checkpoint, "--prompt-ids", unknown)
    assert_refused(done, "token id 251 at position 1 is unknown; use integers from 0 to 250")


@pytest.mark.parametrize("what", ["missing", "no checkpoint"])
def test_a_folder_that_is_no_checkpoint_is_refused(ids: Path, tmp_path: Path, what: str) -> None:
    folder = tmp_path / "missing" if what == "missing" else tmp_path
    done = sps2("generate", "--checkpoint", folder, "--sp", 2, "--prompt-ids", ids)
    complaint = "does not exist" if what == "missing" else "is not a checkpoint of sps2"
    assert_refused(done, str(folder), complaint, "sps2 convert")


def test_a_truncated_checkpoint_file_is_named(checkpoint: Path, ids: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    file = max((broken / "release").iterdir(), key=lambda path: path.stat().st_size)
    size = file.stat().st_size
    os.truncate(file, size - 1)
    done = sps2("generate", "--checkpoint", broken, "--sp", 2, "--prompt-ids", ids)
    assert_refused(done, str(file), f"has {size - 1} bytes, {size} expected", "truncated", "convert")


# Ranks that were told different things.


def start(*command: object, **extra: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    return subprocess.Popen(
        tuple(map(str, command)), stdout=pipe, stderr=pipe, text=True, cwd=ROOT, env=environ(**extra)
    )


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (("--block-size", "32"), "block_size=32 but rank 0 has 64"),
        (("--dtype", "bfloat16"), "dtype='bfloat16' but rank 0 has 'float32'"),
    ],
)
def test_two_ranks_with_different_settings_end_and_rank_0_says_what_differs(
    checkpoint: Path, ids: Path, tmp_path: Path, flags: tuple[str, ...], difference: str
) -> None:
    common = (*SPS2, "generate", "--checkpoint", checkpoint, "--sp", 2, "--prompt-ids", ids)
    world = {"SPS2_WORLD_SIZE": "2", "SPS2_INIT_METHOD": f"file://{tmp_path}/store"}
    ranks = [start(*common, *(flags if rank else ()), SPS2_RANK=str(rank), **world) for rank in range(2)]
    try:
        for rank, process in enumerate(ranks):
            # The first wait includes the start of both; the second rank must not hang once one has ended.
            out, err = process.communicate(timeout=NOTICE_S if rank else START_S)
            assert (process.returncode, out) == (1, ""), err
            assert (f"sps2: error: rank 1 has {difference}" in err) == (rank == 0), err
    finally:
        for process in ranks:
            process.kill()


# Ranks that die.


def descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def await_ranks(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The two local ranks, in order, as soon as both are there: children of the forkserver."""
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        ranks = [child for child in descendants(process) if child.ppid() != process.pid]
        if len(ranks) == 2:
            return sorted(ranks, key=lambda rank: rank.pid)
        time.sleep(0.01)
    raise AssertionError(f"no ranks came: {process.communicate(timeout=NOTICE_S)}")


def kill_and_wait(process: subprocess.Popen[str], victim: psutil.Process) -> tuple[str, str]:
    """(stdout, stderr) of a run that must end soon after `victim` is killed, and leave no process behind."""
    family = descendants(process)
    victim.send_signal(signal.SIGKILL)
    out, err = process.communicate(timeout=NOTICE_S)
    assert process.returncode != 0
    _, left = psutil.wait_procs(family, timeout=10)
    assert left == []
    return out, err


def test_a_rank_killed_before_the_rendezvous_ends_the_run(checkpoint: Path, ids: Path) -> None:
    run = start(*SPS2, "generate", "--checkpoint", checkpoint, "--sp", 2, "--prompt-ids", ids)
    victim = await_ranks(run)[1]
    out, err = kill_and_wait(run, victim)
    assert out == "" and f"sps2: rank 1 (pid {victim.pid}) was killed by SIGKILL" in err


def long_prompt(checkpoint: Path, folder: Path) -> tuple[object, ...]:
    """A run whose prefill takes seconds."""
    ids = write_ids(folder / "ids.json", [5 + i % 200 for i in range(MAX_SEQ_LEN - 8)])
    flags = ("--sp", 2, "--prompt-ids", ids, "--max-tokens", 8, "--log-level", "info")
    return ("generate", "--checkpoint", checkpoint, *flags)


def await_prefill(process: subprocess.Popen[str]) -> None:
    assert process.stderr is not None
    while "prefill: layer 1 of 6" not in (line := process.stderr.readline()):
        assert line, "the run ended before its prefill"


def test_a_rank_that_falls_silent_in_mid_prefill_ends_the_run(checkpoint: Path, tmp_path: Path) -> None:
    """Stopped, not dead: its connections stay open, so that only the time limit can tell."""
    run = start(*SPS2, *long_prompt(checkpoint, tmp_path), "--heartbeat-timeout-s", 3)
    family = await_ranks(run)
    await_prefill(run)
    family[1].send_signal(signal.SIGSTOP)
    out, err = run.communicate(timeout=NOTICE_S)
    assert (run.returncode, out) == (1, "") and "prefill: layer 5 of 6" not in err
    named = (
        f"sps2: error: [rank 0 of 2] rank 1 (pid {family[1].pid} on {socket.gethostname()}) has been silent"
    )
    assert named in err and "last heard in step " in err, err
    assert f"sps2: rank 0 (pid {family[0].pid}) exited with code 1" in err
    assert psutil.wait_procs(family, timeout=10)[1] == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_inside_a_step_of_one_rank_is_printed_and_ends_the_run(
    checkpoint: Path, ids: Path, rank: int
) -> None:
    """A ValueError, which before a step would be the user's, found by all ranks alike."""
    code = "from tests.planted_error import main; main()"
    flags = ("--checkpoint", checkpoint, "--sp", 2, "--prompt-ids", ids)
    run = start(sys.executable, "-c", code, "generate", *flags, PLANTED_RANK=str(rank))
    family = await_ranks(run)
    # The wait includes the start; with ranks waiting for each other it would be the 300 s of a collective.
    out, err = run.communicate(timeout=START_S)
    assert (run.returncode, out) == (1, ""), err
    assert f"sps2: error: [rank {rank} of 2] {PLANTED}\n" in err
    assert f"sps2: rank {rank} (pid {family[rank].pid}) exited with code 1" in err
    assert psutil.wait_procs(family, timeout=10)[1] == []


def test_a_rank_killed_in_mid_prefill_ends_the_run(checkpoint: Path, tmp_path: Path) -> None:
    run = start(*SPS2, *long_prompt(checkpoint, tmp_path))
    ranks = await_ranks(run)
    await_prefill(run)
    out, err = kill_and_wait(run, ranks[1])
    assert out == "" and "prefill: layer 5 of 6" not in err  # five more layers take seconds
    assert f"sps2: rank 1 (pid {ranks[1].pid}) was killed by SIGKILL" in err


def long_answer(checkpoint: Path) -> tuple[object, ...]:
    """A run that streams words for longer than any test takes."""
    flags = ("--sp", 2, "--prompt", words(range(5, 25)), "--max-tokens", 16000, "--ignore-eos")
    return ("generate", "--checkpoint", checkpoint, *flags)


def await_words(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    text = process.stdout.read(20)
    assert text.startswith("w"), process.communicate(timeout=NOTICE_S)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_killed_in_mid_decode_ends_the_run(checkpoint: Path, rank: int) -> None:
    run = start(*SPS2, *long_answer(checkpoint))
    ranks = await_ranks(run)
    await_words(run)
    _, err = kill_and_wait(run, ranks[rank])
    assert f"sps2: rank {rank} (pid {ranks[rank].pid}) was killed by SIGKILL" in err


# Under a launcher.


def torchrun(*args: object, num_ranks: int = 2) -> subprocess.Popen[str]:
    return start("bash", ROOT / "launch" / "torchrun.sh", *args, NPROC=str(num_ranks))


def test_a_world_of_another_size_than_sp_times_tp_is_refused(checkpoint: Path, ids: Path) -> None:
    run = torchrun("generate", "--checkpoint", checkpoint, "--sp", 2, "--prompt-ids", ids, num_ranks=3)
    out, err = run.communicate(timeout=START_S)
    assert run.returncode != 0 and out == ""
    ours = [line for line in err.splitlines() if line.startswith("sps2: error:")]
    assert len(ours) == 1 and "sp_size=2" in ours[0] and "world_size=3 (torchrun)" in ours[0], err
    assert "start 2 ranks" in ours[0]


def test_a_rank_killed_under_torchrun_ends_the_run(checkpoint: Path) -> None:
    run = torchrun(*long_answer(checkpoint))
    await_words(run)
    victim = next(child for child in descendants(run) if child.environ().get("RANK") == "1")
    _, err = kill_and_wait(run, victim)
    assert f"(pid: {victim.pid})" in err and "SIGKILL" in err
    assert "rank      : 1 (local_rank: 1)" in err


@pytest.mark.skipif(sys.platform != "linux", reason="stops a process group")
def test_ctrl_c_ends_all_ranks_quietly(checkpoint: Path) -> None:
    run = start(*SPS2, *long_answer(checkpoint))
    await_words(run)
    family = descendants(run)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate(timeout=NOTICE_S)
    assert run.returncode == 128 + signal.SIGINT and "Traceback" not in err
    assert psutil.wait_procs(family, timeout=10)[1] == []
