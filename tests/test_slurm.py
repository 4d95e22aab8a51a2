"""Jobs of a real SLURM with two nodes: srun, sbatch, torchrun inside, failures, a server and its workload."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_sps2.parallel.heartbeat import BEAT_S
from tests.planted_error import PLANTED
from tests.restarting import await_answer, await_loss, free_pair, front_end, rank_of
from tests.slurm_cluster import NODES, Job, SlurmCluster, slurm_cluster, why_none
from tests.sps2_command import ROOT, answer, demo_flags, environ

pytestmark = [pytest.mark.slow, pytest.mark.skipif(bool(why_none()), reason=why_none())]
TWO_NODES = ("-N", 2, "-n", 2)
LAUNCH = ROOT / "launch"
# From the death of a rank to the end of its job.
NOTICE_S = 30


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    with slurm_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> tuple[object, ...]:
    return demo_flags(tmp_path_factory.mktemp("slurm"))


@pytest.fixture(scope="module")
def spawned(flags: tuple[object, ...]) -> dict[str, Any]:
    """The answer of two ranks that `sps2` started itself."""
    return answer(*flags)


def assert_same(stdout: str, spawned: dict[str, Any]) -> None:
    """One JSON object with the same tokens, spread of the KV and bytes sent."""
    found = json.loads(stdout)
    for key in ("token_ids", "text", "kv_tokens_per_rank", "ledger"):
        assert found[key] == spawned[key]


def with_python(folder: Path, line: str) -> dict[str, str]:
    """An environment in which the first `python` that is found does `line` in the first life of a job."""
    path = folder / "python"
    first = f'if [ -z "${{SLURM_RESTART_COUNT:-}}" ]; then {line}; fi'
    path.write_text(f'#!/usr/bin/env bash\n{first}\nexec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return {"PATH": f"{folder}{os.pathsep}{environ()['PATH']}"}


def with_planted_error(folder: Path) -> dict[str, str]:
    """Rank 1 raises inside a step, while rank 0 waits for it."""
    code = "from tests.planted_error import main; main()"
    line = f'shift 2; exec {sys.executable} -c "{code}" "$@"'
    return {"PLANTED_RANK": "1", **with_python(folder, line)}


def test_srun_on_two_nodes_gives_the_same_answer(
    cluster: SlurmCluster, flags: tuple[object, ...], spawned: dict[str, Any]
) -> None:
    done = cluster.run("srun", *TWO_NODES, "python", "-m", "megatron_sps2", "generate", *flags, "--json")
    assert done.returncode == 0, done.stderr
    assert_same(done.stdout, spawned)


def test_sbatch_on_two_nodes_gives_the_same_answer(
    cluster: SlurmCluster, flags: tuple[object, ...], spawned: dict[str, Any]
) -> None:
    number = cluster.sbatch(*TWO_NODES, LAUNCH / "slurm.sbatch", "generate", *flags, "--json")
    job = cluster.wait(number)
    assert (job.state, job.exit_code, cluster.log(number)) == ("COMPLETED", 0, "")
    assert_same(cluster.output(number), spawned)


def test_one_torchrun_a_node_gives_the_same_answer(
    cluster: SlurmCluster, flags: tuple[object, ...], spawned: dict[str, Any]
) -> None:
    number = cluster.sbatch(
        "-N", 2, LAUNCH / "slurm_torchrun.sbatch", "generate", *flags, "--json", NPROC="1"
    )
    assert cluster.wait(number).state == "COMPLETED", cluster.log(number)
    assert_same(cluster.output(number), spawned)


def test_a_rank_that_fails_ends_the_job_with_its_error(
    cluster: SlurmCluster, flags: tuple[object, ...], tmp_path: Path
) -> None:
    script = (LAUNCH / "slurm.sbatch", "generate", *flags, "--json")
    number = cluster.sbatch(*TWO_NODES, *script, **with_planted_error(tmp_path))
    cluster.wait(number, lambda job: PLANTED in cluster.log(number))
    begin = time.monotonic()
    job = cluster.wait(number)
    assert time.monotonic() - begin < NOTICE_S
    # 1 of the rank that failed, or 143 of the one that srun ended.
    assert (job.state, job.num_restarts, cluster.output(number)) == ("FAILED", 0, "") and job.exit_code > 0
    assert f"sps2: error: [rank 1 of 2] {PLANTED}" in cluster.log(number)


def test_a_job_that_loses_a_node_comes_back(cluster: SlurmCluster, tmp_path: Path) -> None:
    script = (*TWO_NODES, "--requeue", LAUNCH / "slurm.sbatch", "--version")
    number = cluster.sbatch(*script, **with_python(tmp_path, f"touch {tmp_path}/life; sleep 60"))
    cluster.wait(number, lambda job: (tmp_path / "life").exists())
    node = ("scontrol", "update", f"nodename={NODES[1]}", "reason=lost")
    assert cluster.run(*node, "state=down").returncode == 0
    cluster.wait(number, lambda job: job.num_restarts == 1)

    def runs_again(job: Job) -> bool:
        """SLURM refuses while the node is being cleaned of the job, and once it has come back by itself."""
        cluster.run(*node, "state=resume")
        return job.state != "PENDING"

    cluster.wait(number, runs_again)
    assert cluster.wait(number).state == "COMPLETED", cluster.log(number)
    assert cluster.output(number).count("sps2") == 2, "one line of each rank"


def test_a_cancelled_job_stays_cancelled(cluster: SlurmCluster, tmp_path: Path) -> None:
    number = cluster.sbatch(
        *TWO_NODES, LAUNCH / "slurm.sbatch", MAX_RESTARTS="1", **with_python(tmp_path, "sleep 60")
    )
    cluster.wait(number, lambda job: job.state == "RUNNING")
    assert cluster.run("scancel", number).returncode == 0
    job = cluster.wait(number)
    assert (job.state, job.num_restarts) == ("CANCELLED", 0)


# examples/curl.sh, and an answer of many tokens that is still on its way when the workload ends.
WORKLOAD = """
examples/curl.sh "$BASE_URL"
curl -sN "$BASE_URL/v1/completions" -H 'Content-Type: application/json' -o "$STREAM" \\
  -d '{"prompt": [7, 8, 9], "max_tokens": 400, "temperature": 0, "ignore_eos": true, "stream": true}' &
until [ -s "$STREAM" ]; do sleep 0.05; done
echo "$(grep -c DONE "$STREAM") answers are whole"
"""


def test_a_job_serves_runs_its_workload_and_drains(
    cluster: SlurmCluster, flags: tuple[object, ...], tmp_path: Path
) -> None:
    stream = tmp_path / "stream"
    script = (LAUNCH / "slurm_serve_and_bench.sbatch", "serve", *flags[:4], "--max-model-len", 2048)
    number = cluster.sbatch(*TWO_NODES, *script, WORKLOAD=WORKLOAD, STREAM=str(stream))
    job, output = cluster.wait(number), cluster.output(number)
    assert (job.state, job.exit_code) == ("COMPLETED", 0), cluster.log(number)
    assert "# A chat, streamed" in output and "sps2:num_requests" in output
    # Control: the drain began before the answer's end.
    assert "0 answers are whole" in output
    assert "[DONE]" in stream.read_text() and "error" not in stream.read_text()


def test_a_front_end_outside_answers_503_while_its_job_is_queued_again(
    cluster: SlurmCluster, flags: tuple[object, ...], tmp_path: Path
) -> None:
    address = f"127.0.0.1:{free_pair()}"
    engine = ("--role", "engine", "--engine-address", address, "--max-model-len", 2048)
    with front_end(Path(str(flags[1])), address, tmp_path) as server:
        script = (LAUNCH / "slurm.sbatch", "serve", *flags[:4], *engine)
        number = cluster.sbatch(*TWO_NODES, *script, MAX_RESTARTS="1")
        wanted = await_answer(server)
        time.sleep(2 * BEAT_S)  # until rank 0 has heard that the other one began a step
        rank_of(server, 1).kill()
        await_loss(server)
        assert await_answer(server) == wanted
        assert server.metric("sps2:engine_restarts_total") == 1
        assert server.end() == 0
        job = cluster.wait(number)
        assert (job.state, job.exit_code, job.num_restarts) == ("COMPLETED", 0, 1), cluster.log(number)
    log = cluster.log(number)
    assert "rank 1 (pid" in log and "has ended; last heard in step" in log, log
