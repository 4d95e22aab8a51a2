"""A real SLURM for tests: munge, a controller and two nodes on this host, with ports and files of their own.

Nodes are called by loopback addresses, 127.0.0.2 and 127.0.0.3: names that resolve everywhere, so that ranks
find the first of a node list as they do on a cluster. Knows jobs, not what runs in them. Linux, as root.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.sps2_command import ROOT, TIMEOUT_S, environ

NODES = ("127.0.0.2", "127.0.0.3")
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "setpriv")
START_S, END_S = 30.0, 20.0
# A job that is requeued waits until the credentials of its first life have expired; two minutes by default.
CREDENTIAL_S = 5
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}
# More CPUs than the host has: ranks of a test share its cores.
CPUS_PER_NODE = 8

CONF = """\
ClusterName=sps2
FirstJobId={first_job}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge,cred_expire={credential_s}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerParameters=sched_interval=1,bf_interval=1
MpiDefault=none
JobRequeue=1
ReturnToService=2
KillWait=5
SlurmdTimeout=60
InactiveLimit=0
{nodes}
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def why_none() -> str:
    """Why no cluster can be started here; "" where one can."""
    missing = [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]
    if missing:
        return f"no {', '.join(missing)}; Debian: apt-get install slurm-wlm munge"
    return "" if os.geteuid() == 0 else "SLURM's daemons need root"


@dataclass(frozen=True, slots=True)
class Job:
    """What SLURM says of a batch job."""

    state: str
    exit_code: int
    num_restarts: int


@dataclass(frozen=True, slots=True)
class SlurmCluster:
    """A running cluster."""

    folder: Path

    def environ(self, **extra: str) -> dict[str, str]:
        return environ(SLURM_CONF=str(self.folder / "slurm.conf"), **extra)

    def run(self, *command: object, **extra: str) -> subprocess.CompletedProcess[str]:
        """A command, such as srun, that talks to this cluster."""
        return subprocess.run(
            list(map(str, command)),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            cwd=ROOT,
            env=self.environ(**extra),
        )

    def sbatch(self, *args: object, **extra: str) -> int:
        """Submits `sbatch ARGS`, with `extra` in its environment -> the job's number."""
        logs = (f"--output={self.folder}/job-%j.out", f"--error={self.folder}/job-%j.err")
        done = self.run("sbatch", "--parsable", *logs, *args, **extra)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    def job(self, number: int) -> Job:
        text = self.run("scontrol", "show", "job", "--oneliner", number).stdout
        found = dict(re.findall(r"(JobState|ExitCode|Restarts)=(\w+)", text))
        return Job(found["JobState"], int(found["ExitCode"]), int(found["Restarts"]))

    def wait(self, number: int, wanted: Callable[[Job], bool] = lambda job: job.state in ENDED) -> Job:
        """Waits until the job is as `wanted`: by default, until it has ended."""
        end = time.monotonic() + TIMEOUT_S
        while not wanted(job := self.job(number)):
            assert job.state not in ENDED and time.monotonic() < end, f"{job}; {self.log(number)}"
            time.sleep(0.1)
        return job

    def output(self, number: int) -> str:
        """What the job wrote to stdout."""
        return (self.folder / f"job-{number}.out").read_text()

    def log(self, number: int) -> str:
        """What the job wrote to stderr."""
        path = self.folder / f"job-{number}.err"
        return path.read_text() if path.exists() else ""


@contextmanager
def slurm_cluster() -> Iterator[SlurmCluster]:
    """Two idle nodes; at the end nothing of them or of their jobs is left."""
    # Not pytest's folder: its name may be too long for a socket.
    with tempfile.TemporaryDirectory(prefix="slurm-") as name:
        cluster = SlurmCluster(Path(name))
        _write_settings(cluster.folder)
        daemons = _start_daemons(cluster)
        try:
            _await_nodes(cluster, daemons)
            yield cluster
        finally:
            _end(cluster, daemons)


def _path() -> str:
    """Debian keeps daemons where only root's shell looks."""
    return f"{os.environ['PATH']}{os.pathsep}/usr/sbin{os.pathsep}/sbin"


def _free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _write_settings(folder: Path) -> None:
    host, (controller_port, *ports) = socket.gethostname().partition(".")[0], _free_ports(1 + len(NODES))
    nodes = "\n".join(
        f"NodeName={node} NodeHostname={host} NodeAddr={node} Port={port} CPUs={CPUS_PER_NODE}"
        for node, port in zip(NODES, ports, strict=True)
    )
    values = {"host": host, "controller_port": controller_port, "nodes": nodes, "credential_s": CREDENTIAL_S}
    # Ranks meet at a port that follows from the job's number: two clusters on this host shall not share one.
    values["first_job"] = secrets.randbelow(10_000) + 1
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, **values))
    # Nothing above asks for a control group; SLURM 22 wants a plugin that can be loaded nevertheless.
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
    (folder / "key").write_bytes(secrets.token_bytes(128))
    (folder / "key").chmod(0o400)
    for name in ("state", *NODES):
        (folder / name).mkdir()


def _start_daemons(cluster: SlurmCluster) -> list[subprocess.Popen[bytes]]:
    folder, conf = cluster.folder, cluster.folder / "slurm.conf"
    files = [f"--{what}-file={folder}/munge.{what}" for what in ("pid", "log", "seed")]
    commands = [
        ["munged", "--force", "--foreground", f"--socket={folder}/munge", f"--key-file={folder}/key", *files],
        ["slurmctld", "-D", "-f", str(conf)],
        *(["slurmd", "-D", "-N", node, "-f", str(conf)] for node in NODES),
    ]
    return [_start(command, folder / f"daemon-{i}.log") for i, command in enumerate(commands)]


def _start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """A daemon that dies with this process, however that ends."""
    with log.open("wb") as file:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            env=os.environ | {"PATH": _path()},
        )


def _await_nodes(cluster: SlurmCluster, daemons: list[subprocess.Popen[bytes]]) -> None:
    end = time.monotonic() + START_S
    while cluster.run("sinfo", "--noheader", "--Node", "--format=%T").stdout.split() != ["idle"] * len(NODES):
        if time.monotonic() > end or any(daemon.poll() is not None for daemon in daemons):
            logs = [path.read_text() for path in sorted(cluster.folder.glob("daemon-*.log"))]
            raise RuntimeError("\n".join(("SLURM's nodes did not become idle", *logs)))
        time.sleep(0.1)


def _end(cluster: SlurmCluster, daemons: list[subprocess.Popen[bytes]]) -> None:
    """Jobs first, then the daemons, then what neither of them ended."""
    cluster.run("scancel", "--user=root", "--full")
    end = time.monotonic() + END_S
    while cluster.run("squeue", "--noheader").stdout.strip() and time.monotonic() < end:
        time.sleep(0.1)
    for daemon in reversed(daemons):
        daemon.terminate()
    for daemon in daemons:
        try:
            daemon.wait(END_S)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
    for process in _left_by(cluster):
        process.kill()


def _left_by(cluster: SlurmCluster) -> list[psutil.Process]:
    """Processes whose environment or command names this cluster's folder."""
    left = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and (
                process.environ().get("SLURM_CONF", "").startswith(f"{cluster.folder}/")
                or any(str(cluster.folder) in word for word in process.cmdline())
            ):
                left.append(process)
        except psutil.Error:
            continue
    return left
