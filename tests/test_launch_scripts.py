"""launch/ without ranks: clean shell, what scripts do around the ranks, the systemd unit, the hostfile."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.sps2_command import ROOT, environ

LAUNCH = ROOT / "launch"
SCRIPTS = sorted(str(path) for path in LAUNCH.iterdir() if path.suffix in (".sh", ".sbatch"))
# A server that is healthy as soon as it has a port, and ends when it is told to; "srun broken" ends at once.
SRUN = """\
case "$*" in *broken*) exit 5 ;; esac
echo "srun $*" >>"$CALLS"
trap 'exit 0' TERM
echo $$ >"$CALLS.server"
echo 4242 >"${@: -1}"
while true; do sleep 0.05; done
"""
SCANCEL = 'echo "scancel $*" >>"$CALLS"; kill "$(<"$CALLS.server")"'
SCONTROL, SQUEUE = 'echo "scontrol $*" >>"$CALLS"', 'echo "${STATE:-RUNNING}"'
REQUEUED = "scontrol requeue 7"


def run_script(
    name: str, *args: str, folder: Path, programs: dict[str, str], **extra: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """launch/NAME in job 7, with stand-ins for `programs` -> (what came of it, the calls they noted)."""
    for program, body in programs.items():
        path = folder / program
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    calls = folder / "calls"
    calls.touch()
    job = {"SLURM_JOB_ID": "7", "CALLS": str(calls), "PATH": f"{folder}{os.pathsep}{environ()['PATH']}"}
    done = subprocess.run(
        ("bash", str(LAUNCH / name), *args),
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        env=environ(**job, **extra),
    )
    return done, calls.read_text().splitlines()


@pytest.mark.skipif(
    shutil.which("shellcheck") is None, reason="no shellcheck; Debian: apt-get install shellcheck"
)
def test_scripts_are_clean() -> None:
    others = (str(ROOT / ".ci" / "run"), str(ROOT / "examples" / "curl.sh"))
    done = subprocess.run(("shellcheck", *SCRIPTS, *others), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
    assert len(SCRIPTS) == 6


def serve_and_bench(
    folder: Path, *args: str, **extra: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    programs = {"srun": SRUN, "scancel": SCANCEL, "curl": "exit 0"}
    return run_script("slurm_serve_and_bench.sbatch", *args, folder=folder, programs=programs, **extra)


def test_a_workload_after_dashes_finds_the_server_and_its_status_is_the_jobs(tmp_path: Path) -> None:
    workload = ("--", "bash", "-c", 'echo "$BASE_URL"; exit 3')
    done, calls = serve_and_bench(tmp_path, "serve", "--sp", "2", *workload)
    assert (done.returncode, done.stdout) == (3, "http://127.0.0.1:4242\n"), done.stderr
    assert "-m megatron_sps2 serve --sp 2 --port 0 --port-file" in calls[0]
    assert calls[1:] == ["scancel --signal=TERM 7.0"]


def test_a_workload_in_the_environment_is_a_line_of_shell(tmp_path: Path) -> None:
    done, _ = serve_and_bench(tmp_path, "serve", WORKLOAD='echo "$BASE_URL" | tr 4 5')
    assert (done.returncode, done.stdout) == (0, "http://127.0.0.1:5252\n"), done.stderr


def test_a_server_that_does_not_start_ends_the_job_with_its_status(tmp_path: Path) -> None:
    done, calls = serve_and_bench(tmp_path, "serve", "--broken", "--", "echo", "not run")
    assert (done.returncode, done.stdout, calls) == (5, "", [])


@pytest.mark.parametrize(
    ("status", "count", "wanted"),
    [
        (0, None, []),
        (1, None, [REQUEUED]),
        (137, "1", [REQUEUED]),
        (1, "2", []),
        (2, None, []),
    ],
    ids=["done", "first failure", "second failure", "third failure", "a mistake"],
)
def test_failures_are_queued_again_and_mistakes_are_not(
    tmp_path: Path, status: int, count: str | None, wanted: list[str]
) -> None:
    extra = {"MAX_RESTARTS": "2"} | ({"SLURM_RESTART_COUNT": count} if count else {})
    programs = {"srun": f"exit {status}", "scontrol": SCONTROL, "squeue": SQUEUE}
    done, calls = run_script("slurm.sbatch", "generate", folder=tmp_path, programs=programs, **extra)
    assert (done.returncode, calls) == (status, wanted)


@pytest.mark.parametrize(
    "extra", [{}, {"MAX_RESTARTS": "2", "STATE": "COMPLETING"}], ids=["not asked", "cancelled"]
)
def test_control_nothing_is_queued_again_unless_asked(tmp_path: Path, extra: dict[str, str]) -> None:
    programs = {"srun": "exit 143", "scontrol": SCONTROL, "squeue": SQUEUE}
    done, calls = run_script("slurm.sbatch", "generate", folder=tmp_path, programs=programs, **extra)
    assert (done.returncode, calls) == (143, [])


def test_mpirun_takes_along_what_other_hosts_need(tmp_path: Path) -> None:
    programs = {"mpirun": 'echo "$@" >>"$CALLS"'}
    extra = {"HOSTFILE": "hosts", "NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth1", "NPROC": "4"}
    extra["MPIRUN_ARGS"] = "'--map-by' node:PE=2 --report-bindings"
    _, calls = run_script("mpirun.sh", "generate", "--sp", "4", folder=tmp_path, programs=programs, **extra)
    words = calls[0].split()
    taken = [words[i + 1] for i, word in enumerate(words) if word == "-x"]
    assert "--map-by node:PE=2 --report-bindings" in calls[0]
    assert sorted(taken) == ["GLOO_SOCKET_IFNAME", "NCCL_DEBUG", "OMP_NUM_THREADS", "PYTHONPATH"]
    assert calls[0].startswith("--hostfile hosts -n 4 ") and calls[0].endswith(
        "-m megatron_sps2 generate --sp 4"
    )


def test_several_hosts_by_torchrun_need_a_place_to_meet(tmp_path: Path) -> None:
    done, calls = run_script(
        "torchrun.sh", "generate", folder=tmp_path, programs={"torchrun": 'echo "$@" >>"$CALLS"'}, NNODES="2"
    )
    assert done.returncode != 0 and "RDZV_ENDPOINT: give HOST:PORT" in done.stderr and calls == []


def test_the_example_of_a_hostfile_is_deepspeeds() -> None:
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(LAUNCH / "hostfile.example")) == {"node-a": 4, "node-b": 4}


def verify_unit(path: Path) -> str:
    """What systemd complains of."""
    command = ("systemd-analyze", "verify", str(path))
    return subprocess.run(command, capture_output=True, text=True, timeout=60).stderr


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze")
def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    assert "sps2.service" not in verify_unit(LAUNCH / "sps2.service")
    # Control: a word that systemd does not know.
    wrong = tmp_path / "sps2.service"
    wrong.write_text((LAUNCH / "sps2.service").read_text().replace("KillMode", "KillManner"))
    assert "KillManner" in verify_unit(wrong)


def test_the_unit_leaves_time_to_drain() -> None:
    from megatron_sps2.cli.main import build_parser

    lines = (line.partition("=") for line in (LAUNCH / "sps2.service").read_text().splitlines())
    unit = {name: value for name, mark, value in lines if mark}
    flags = next(
        line.partition("=")[2].split()
        for line in (LAUNCH / "sps2.env.example").read_text().splitlines()
        if line.startswith("SPS2_FLAGS=")
    )
    args = build_parser().parse_args(["serve", *flags])
    assert int(unit["TimeoutStopSec"]) > args.drain_timeout_s
    assert (unit["KillMode"], unit["KillSignal"]) == ("mixed", "SIGTERM")
