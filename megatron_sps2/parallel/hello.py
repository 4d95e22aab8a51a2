"""What a rank says of itself when it comes: its place, its host, its versions. Plain data; knows no torch."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_sps2.parallel.host import available_cores
from megatron_sps2.parallel.rank_env import RankEnv

# What must be the same everywhere: ranks exchange objects of these, and compute with them.
PACKAGES = ("megatron_sps2", "torch", "megatron-core")
# How launchers number their jobs: two jobs that meet at one port differ in it.
JOB_VARIABLES = {"slurm": "SLURM_JOB_ID", "torchrun": "TORCHELASTIC_RUN_ID", "openmpi": "PMIX_NAMESPACE"}
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """One rank's introduction."""

    rank: int
    world_size: int
    host: str
    boot: str  # with the host's name it tells machines apart: two of them may have one name
    pid: int
    job: str
    versions: dict[str, str]
    cores: tuple[int, ...]  # that this process may run on

    @property
    def node(self) -> tuple[str, str]:
        """The same for ranks of one machine."""
        return self.host, self.boot

    @property
    def name(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"

    def encode(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str | bytes) -> Hello:
        fields = json.loads(text)
        return cls(**{**fields, "cores": tuple(fields["cores"])})


def own_hello(env: RankEnv, environ: Mapping[str, str] | None = None) -> Hello:
    """Of this process."""
    variables = os.environ if environ is None else environ
    return Hello(
        rank=env.rank,
        world_size=env.world_size,
        host=socket.gethostname(),
        boot=_BOOT_ID.read_text().strip() if _BOOT_ID.is_file() else "",
        pid=os.getpid(),
        job=variables.get(JOB_VARIABLES.get(env.launcher, ""), ""),
        versions=_versions(),
        cores=available_cores(),
    )


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def find_difference(mine: Hello, other: Hello) -> str | None:
    """Why `other` cannot be in a world with `mine`, who has rank 0; None if it can."""
    if other.world_size != mine.world_size:
        return (
            f"{other.name} was started for world_size={other.world_size}, {mine.name} for world_size="
            f"{mine.world_size}; start all ranks with the same number of nodes and ranks a node"
        )
    if other.job != mine.job:
        return (
            f"{other.name} is of job {other.job!r}, {mine.name} of job {mine.job!r}; two jobs meet at one "
            "address: give each its own MASTER_PORT"
        )
    for package, wanted in mine.versions.items():
        if (found := other.versions.get(package)) != wanted:
            return (
                f"{other.name} has {package} {found}, {mine.name} has {wanted}; install the same versions "
                "on all hosts"
            )
    return None
