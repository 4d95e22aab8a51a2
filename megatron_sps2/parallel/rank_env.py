"""Who am I: one RankEnv read from whichever launcher started this process.

Reads torchrun, deepspeed, Open MPI, SLURM and our own spawner. Knows variables, not groups or devices.
A world that does not add up is a RuntimeError, never a silent rank 0 of 1.
"""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING

from megatron_sps2.config import ParallelConfig
from megatron_sps2.parallel import slurm
from megatron_sps2.parallel.host import num_cores

if TYPE_CHECKING:
    from torch.distributed import Store

Environ = Mapping[str, str]
# Where our own spawner, torchrun or deepspeed, and Open MPI say (rank, world size).
PLACES = (
    ("SPS2_RANK", "SPS2_WORLD_SIZE"),
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
)
LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEnv:
    """This process's place in the world, as its launcher gave it."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    init_method: str  # tcp://host:port or file:///path, for torch.distributed; "" for a process alone
    launcher: str  # torchrun, deepspeed, openmpi, slurm, local, env (variables set by hand) or none

    def __post_init__(self) -> None:
        for name, value, size in (
            ("rank", self.rank, self.world_size),
            ("local_rank", self.local_rank, self.local_world_size),
            ("local_world_size - 1", self.local_world_size - 1, self.world_size),
        ):
            if not 0 <= value < size:
                raise RuntimeError(
                    f"{self.launcher} says rank {self.rank} of world_size={self.world_size}, local_rank "
                    f"{self.local_rank} of local_world_size={self.local_world_size}; {name}={value} must lie "
                    f"in 0..{size - 1}; start all ranks by one launcher, clear variables left in the shell"
                )

    @classmethod
    def alone(cls) -> RankEnv:
        """A world of one process that no launcher started."""
        return cls(rank=0, world_size=1, local_rank=0, local_world_size=1, init_method="", launcher="none")

    @classmethod
    def detect(cls, environ: Environ | None = None) -> RankEnv | None:
        """The RankEnv of the launcher that started this process; None without one (a single process).

        The launcher nearest to this process is read, and those around it must not contradict it. Raises
        RuntimeError for variables that are missing, malformed or in conflict.
        """
        env = os.environ if environ is None else environ
        if "SPS2_RANK" in env:
            return _read_local(env)
        slurm_place = _slurm_place(env)
        if "RANK" in env:
            found = _read_env(env)
            _check_outer(found, "mpirun", _openmpi_place(env))
        elif "OMPI_COMM_WORLD_RANK" in env:
            found = _read_openmpi(env)
        elif slurm_place:
            return _read_slurm(env)
        else:
            _check_no_launcher(env)
            return None
        _check_outer(found, "srun", slurm_place)
        return found

    def check_world(self, parallel: ParallelConfig) -> None:
        """Raises ValueError unless world_size = dp_size x sp_size x tp_size."""
        wanted = parallel.world_size
        if self.world_size != wanted:
            raise ValueError(
                f"dp_size={parallel.dp_size} x sp_size={parallel.sp_size} x tp_size={parallel.tp_size} "
                f"is {wanted} and world_size={self.world_size} ({self.launcher}); they must be equal: start "
                f"{wanted} ranks, or choose --sp and --tp whose product is {self.world_size}"
            )


def launched_rank(environ: Environ | None = None) -> tuple[int, int] | None:
    """(rank, world size) as the launcher says, for the label of a line; None where it says nothing readable.

    Checks nothing and, unlike `detect` under mpirun, reaches no other rank: a rank in trouble may call it.
    """
    env = os.environ if environ is None else environ
    for rank, size in PLACES:
        if env.get(rank, "").isdecimal() and env.get(size, "").isdecimal():
            return int(env[rank]), int(env[size])
    try:
        return _slurm_place(env)
    except RuntimeError:
        return None


# oneDNN and torch's wrapper of it keep, for each shape that a matrix product ever had, about half a megabyte,
# and 1,024 of them. Batches of a server have all shapes: a rank would grow by hundreds of megabytes.
SHAPE_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}


def limit_shape_caches(environ: MutableMapping[str, str]) -> None:
    """For a process that has not imported torch yet, or for those it starts; what the user has set stays."""
    for name, value in SHAPE_CACHES.items():
        environ.setdefault(name, value)


def threads_per_rank(local_world_size: int) -> int:
    """Compute threads for each of `local_world_size` ranks that share this host's cores; at least 1."""
    return max(1, num_cores() // local_world_size)


def init_process_group(env: RankEnv, backend: str, timeout: timedelta, store: Store | None = None) -> None:
    """Starts torch.distributed for `env`; every rank of the world calls it once.

    Over a `store` in which the ranks have met, or over one that it opens itself.

    Never deepspeed.init_distributed: on CPU it compiles a C++ op for a minute first and looks hung.
    """
    import torch.distributed as dist

    if store is None and env.world_size == 1:
        store = dist.HashStore()
    if store is not None:
        store.set_timeout(timeout)
    dist.init_process_group(
        backend,
        init_method=env.init_method if store is None else None,
        store=store,
        rank=env.rank,
        world_size=env.world_size,
        timeout=timeout,
    )
    if backend == "gloo":
        dist.barrier()  # All are connected to all: one that ends from now on breaks no other one's start.


def _read_int(env: Environ, *names: str) -> int:
    """The first of `names` that is set, as an integer."""
    for name in names:
        if name in env:
            try:
                return int(env[name])
            except ValueError:
                raise RuntimeError(
                    f"{name}={env[name]!r} is not an integer; the launcher sets it, clear it"
                ) from None
    raise RuntimeError(
        f"{' or '.join(names)} is not set though other variables of a launcher are; set it or clear them"
    )


def _tcp(host: str, port: int) -> str:
    if not 0 < port < 65536:
        raise RuntimeError(f"MASTER_PORT={port} is not a port; use 1 to 65535")
    return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"


def _master(env: Environ) -> str | None:
    """tcp:// address from MASTER_ADDR and MASTER_PORT; None when neither is set."""
    if "MASTER_ADDR" not in env and "MASTER_PORT" not in env:
        return None
    if "MASTER_ADDR" not in env:
        raise RuntimeError("MASTER_ADDR is not set though MASTER_PORT is; set both or neither")
    return _tcp(env["MASTER_ADDR"], _read_int(env, "MASTER_PORT"))


def _read_local(env: Environ) -> RankEnv:
    """Our own spawner, local_world.py: all ranks on this host."""
    rank, size = _read_int(env, "SPS2_RANK"), _read_int(env, "SPS2_WORLD_SIZE")
    if "SPS2_INIT_METHOD" not in env:
        raise RuntimeError(
            "SPS2_INIT_METHOD is not set though SPS2_RANK is; sps2 sets both itself, clear SPS2_RANK"
        )
    return RankEnv(
        rank=rank,
        world_size=size,
        local_rank=rank,
        local_world_size=size,
        init_method=env["SPS2_INIT_METHOD"],
        launcher="local",
    )


def _read_env(env: Environ) -> RankEnv:
    """RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE (deepspeed: LOCAL_SIZE), MASTER_ADDR, MASTER_PORT."""
    rank, size = _read_int(env, "RANK"), _read_int(env, "WORLD_SIZE")
    master = _master(env)
    if master is None:
        raise RuntimeError(
            "MASTER_ADDR and MASTER_PORT are not set though RANK is; start with torchrun, or set them"
        )
    # A loopback address means that all ranks are on this host; only then may the local variables be left out.
    here = {"LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(size)} if env["MASTER_ADDR"] in LOOPBACK else {}
    elastic = any(name.startswith("TORCHELASTIC_") for name in env)
    return RankEnv(
        rank=rank,
        world_size=size,
        local_rank=_read_int({**here, **env}, "LOCAL_RANK"),
        local_world_size=_read_int(
            env if "LOCAL_SIZE" in env else {**here, **env}, "LOCAL_WORLD_SIZE", "LOCAL_SIZE"
        ),
        init_method=master,
        launcher="torchrun" if elastic else "deepspeed" if "CROSS_RANK" in env else "env",
    )


def _read_openmpi(env: Environ) -> RankEnv:
    """mpirun, by hand or through `deepspeed --launcher openmpi`."""
    rank, size = _read_int(env, "OMPI_COMM_WORLD_RANK"), _read_int(env, "OMPI_COMM_WORLD_SIZE")
    local_size = _read_int(env, "OMPI_COMM_WORLD_LOCAL_SIZE")
    _check_world_size(env, "mpirun", size)
    return RankEnv(
        rank=rank,
        world_size=size,
        local_rank=_read_int(env, "OMPI_COMM_WORLD_LOCAL_RANK"),
        local_world_size=local_size,
        init_method=_master(env) or _master_by_mpi(rank, size, one_host=local_size == size),
        launcher="openmpi",
    )


@functools.cache
def _master_by_mpi(rank: int, world_size: int, *, one_host: bool) -> str:
    """Rank 0 names its host and a free port to all ranks, by one MPI broadcast; once in a process.

    MPI ends with it. mpi4py would end it when the process does, and that waits for all ranks: one that has
    failed would hang there, and the others wait for it.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(
            f"mpirun does not name rank 0's address and mpi4py is unusable ({str(error).splitlines()[0]}); "
            f"install mpi4py beside mpirun's own MPI library, or set MASTER_ADDR and MASTER_PORT"
        ) from error
    comm = MPI.COMM_WORLD
    if (comm.Get_rank(), comm.Get_size()) != (rank, world_size):
        raise RuntimeError(
            f"mpirun says rank {rank} of {world_size}, mpi4py says {comm.Get_rank()} of {comm.Get_size()}; "
            f"mpi4py loaded another MPI library than mpirun's: keep one, or set MASTER_ADDR and MASTER_PORT"
        )
    address = str(comm.bcast(_own_address(one_host) if rank == 0 else None, root=0))
    MPI.Finalize()
    return address


def _own_address(one_host: bool) -> str:
    """A free port here, at an address that all ranks can reach; a host's name may not resolve to itself."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return _tcp("127.0.0.1" if one_host else socket.gethostname(), probe.getsockname()[1])


def _read_slurm(env: Environ) -> RankEnv:
    """A task of an srun step."""
    size = slurm.num_tasks(env)
    _check_world_size(env, "srun", size)
    return RankEnv(
        rank=_read_int(env, "SLURM_PROCID"),
        world_size=size,
        local_rank=_read_int(env, "SLURM_LOCALID"),
        local_world_size=slurm.tasks_on_node(env),
        init_method=_master(env) or _tcp(slurm.first_host(env), slurm.job_port(env)),
        launcher="slurm",
    )


def _slurm_place(env: Environ) -> tuple[int, int] | None:
    """(rank, tasks) in an srun step of several tasks; a step of one task is a process like any other."""
    if not slurm.in_step(env) or slurm.num_tasks(env) == 1:
        return None
    return _read_int(env, "SLURM_PROCID"), slurm.num_tasks(env)


def _openmpi_place(env: Environ) -> tuple[int, int] | None:
    if "OMPI_COMM_WORLD_RANK" not in env:
        return None
    return _read_int(env, "OMPI_COMM_WORLD_RANK"), _read_int(env, "OMPI_COMM_WORLD_SIZE")


def _check_no_launcher(env: Environ) -> None:
    """A world size without any rank is a broken launch, not a single process."""
    for prefix in ("SPS2_", "OMPI_COMM_", ""):
        name = f"{prefix}WORLD_SIZE"
        if name in env and _read_int(env, name) > 1:
            rank = "OMPI_COMM_WORLD_RANK" if prefix == "OMPI_COMM_" else f"{prefix}RANK"
            raise RuntimeError(
                f"{name}={env[name]} is set and {rank} is not; start ranks by one launcher, or clear {name}"
            )


def _check_world_size(env: Environ, starter: str, size: int) -> None:
    """Scripts often export WORLD_SIZE beside mpirun's or srun's own variables; it must say the same."""
    if "WORLD_SIZE" in env and _read_int(env, "WORLD_SIZE") != size:
        raise RuntimeError(
            f"{starter} started {size} ranks and WORLD_SIZE={env['WORLD_SIZE']}; clear or correct WORLD_SIZE"
        )


def _check_outer(inner: RankEnv, starter: str, outer: tuple[int, int] | None) -> None:
    """Raises RuntimeError when `starter`'s (rank, size) around `inner` shows separate worlds.

    Sound nestings: one inner launcher a node, all of one world; and mpirun, its daemons started by srun.
    """
    if outer is None or outer == (inner.rank, inner.world_size):
        return
    rank, size = outer
    one_launcher_per_node = inner.world_size == size * inner.local_world_size
    if one_launcher_per_node or (inner.launcher == "openmpi" and size < inner.world_size):
        return
    raise RuntimeError(
        f"{inner.launcher} says rank {inner.rank} of {inner.world_size}, {starter} says rank {rank} of "
        f"{size}; these are separate worlds: start the ranks by {starter} alone, or leave {starter} out"
    )
