"""RankEnv: what each launcher sets is read right, and a world that does not add up is refused."""

import sys
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_sps2.config import ParallelConfig
from megatron_sps2.parallel import rank_env, slurm
from megatron_sps2.parallel.rank_env import RankEnv, init_process_group, launched_rank, threads_per_rank

MASTER = {"MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}
TORCHRUN = {
    **MASTER,
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "TORCHELASTIC_RUN_ID": "none",
}
DEEPSPEED = {
    **MASTER,
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "6",
    "SLURM_NTASKS": "7",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "3",
    "SLURM_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_NODELIST": "n[01-03,7]",
}
LOCAL = {"SPS2_RANK": "1", "SPS2_WORLD_SIZE": "2", "SPS2_INIT_METHOD": "file:///tmp/store"}


def detected(environ: dict[str, str]) -> RankEnv:
    env = RankEnv.detect(environ)
    assert env is not None
    return env


def test_a_process_without_a_launcher_has_no_rank() -> None:
    assert RankEnv.detect({}) is None
    assert RankEnv.detect({"WORLD_SIZE": "1", "HOME": "/root"}) is None


@pytest.mark.parametrize(
    ("environ", "place", "method", "launcher"),
    [
        (TORCHRUN, (5, 8, 1, 4), "tcp://10.0.0.7:29500", "torchrun"),
        (DEEPSPEED, (3, 4, 1, 2), "tcp://10.0.0.7:29500", "deepspeed"),
        (OPENMPI | MASTER, (2, 4, 0, 2), "tcp://10.0.0.7:29500", "openmpi"),
        (SRUN | MASTER, (6, 7, 0, 1), "tcp://10.0.0.7:29500", "slurm"),
        (LOCAL, (1, 2, 1, 2), "file:///tmp/store", "local"),
    ],
)
def test_each_launcher_is_read(
    environ: dict[str, str], place: tuple[int, int, int, int], method: str, launcher: str
) -> None:
    env = detected(environ)
    assert (env.rank, env.world_size, env.local_rank, env.local_world_size) == place
    assert (env.init_method, env.launcher) == (method, launcher)


def test_variables_set_by_hand_need_no_local_size_on_one_host() -> None:
    by_hand = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"}
    env = detected(by_hand)
    assert (env.local_rank, env.local_world_size, env.launcher) == (1, 2, "env")
    with pytest.raises(RuntimeError, match="LOCAL_RANK is not set"):
        RankEnv.detect(by_hand | {"MASTER_ADDR": "10.0.0.7"})


def test_an_ipv6_master_is_bracketed() -> None:
    assert detected(TORCHRUN | {"MASTER_ADDR": "fe80::1"}).init_method == "tcp://[fe80::1]:29500"


def test_srun_names_the_first_host_and_a_port_of_the_step() -> None:
    first, second = detected(SRUN), detected(SRUN | {"SLURM_STEP_ID": "1"})
    assert first.init_method.startswith("tcp://n01:")
    assert first.init_method != second.init_method
    assert detected(SRUN | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}).init_method == first.init_method


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_ID": "4294967291"}, {"SLURM_STEP_ID": "4294967290"}])
def test_the_shell_of_an_allocation_is_not_a_rank(step: dict[str, str]) -> None:
    shell = {name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"} | step
    assert RankEnv.detect(shell | {"SLURM_PROCID": "0"}) is None


def test_an_srun_step_of_one_task_is_a_single_process() -> None:
    assert RankEnv.detect(SRUN | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}) is None


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        (TORCHRUN | {"RANK": "8"}, "rank=8 must lie in 0..7"),
        (TORCHRUN | {"RANK": "-1"}, "rank=-1 must lie"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "local_rank=4 must lie in 0..3"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, "local_world_size - 1=8 must lie in 0..7"),
        (TORCHRUN | {"RANK": "five"}, "RANK='five' is not an integer"),
        (TORCHRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000"),
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT are not set"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set and RANK is not"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_RANK is not"),
        ({"SPS2_RANK": "0", "SPS2_WORLD_SIZE": "2"}, "SPS2_INIT_METHOD is not set"),
        (OPENMPI | {"MASTER_ADDR": "a"}, "MASTER_PORT is not set"),
        (OPENMPI | MASTER | {"WORLD_SIZE": "8"}, "mpirun started 4 ranks and WORLD_SIZE=8"),
        (SRUN | {"SLURM_PROCID": "7"}, "rank=7 must lie in 0..6"),
        (SRUN | {"SLURM_TASKS_PER_NODE": "2(x3)"}, "must add up"),
        (SRUN | {"SLURM_TASKS_PER_NODE": "two"}, "cannot be read"),
        (SRUN | {"SLURM_STEP_NODELIST": "n[01-"}, "cannot be read"),
    ],
)
def test_a_world_that_does_not_add_up_is_refused(environ: dict[str, str], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        RankEnv.detect(environ)


@pytest.mark.parametrize("inner", [TORCHRUN, DEEPSPEED])
@pytest.mark.parametrize("outer", [SRUN, OPENMPI])
def test_a_launcher_that_makes_every_task_rank_0_of_1_is_refused(
    inner: dict[str, str], outer: dict[str, str]
) -> None:
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "LOCAL_SIZE": "1"}
    with pytest.raises(RuntimeError, match="separate worlds"):
        RankEnv.detect(outer | inner | alone)


def test_mpirun_ranks_of_one_under_srun_are_refused() -> None:
    alone = OPENMPI | MASTER | {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"}
    with pytest.raises(RuntimeError, match="separate worlds"):
        RankEnv.detect(SRUN | alone | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"})


def test_sound_nestings_are_accepted() -> None:
    two_nodes = SRUN | {"SLURM_NTASKS": "2", "SLURM_PROCID": "1", "SLURM_TASKS_PER_NODE": "1(x2)"}
    assert detected(two_nodes | TORCHRUN).launcher == "torchrun"
    assert detected(two_nodes | OPENMPI | MASTER).launcher == "openmpi"
    same = {"RANK": "6", "WORLD_SIZE": "7", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    assert detected(SRUN | MASTER | same).launcher == "env"


@pytest.fixture(autouse=True)
def not_asked_yet() -> None:
    rank_env._master_by_mpi.cache_clear()


class FakeComm:
    """Stands for mpi4py's COMM_WORLD of 4 ranks, seen from rank 2."""

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self.ended = False

    def end(self) -> None:
        self.ended = True

    def Get_rank(self) -> int:
        return 2

    def Get_size(self) -> int:
        return self.size

    def bcast(self, value: str | None, root: int) -> str:
        assert (value, root) == (None, 0), "only rank 0 names an address"
        return "tcp://host0:4242"


def fake_mpi(monkeypatch: pytest.MonkeyPatch, comm: FakeComm) -> None:
    monkeypatch.setitem(
        sys.modules, "mpi4py", SimpleNamespace(MPI=SimpleNamespace(COMM_WORLD=comm, Finalize=comm.end))
    )


def test_open_mpi_without_an_address_asks_rank_0_once(monkeypatch: pytest.MonkeyPatch) -> None:
    comm = FakeComm()
    fake_mpi(monkeypatch, comm)
    assert detected(OPENMPI).init_method == "tcp://host0:4242"
    assert comm.ended, "MPI left to end with the process would make a failed rank wait for the others"
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # it has ended, and may not be asked again
    assert detected(OPENMPI).init_method == "tcp://host0:4242"


def test_the_label_of_a_rank_needs_no_other_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    places = [launched_rank(env) for env in (OPENMPI, TORCHRUN, {}, {"RANK": "x", "WORLD_SIZE": "2"})]
    found = [(detected(TORCHRUN).rank, detected(TORCHRUN).world_size), None, None]
    assert places == [(2, 4), *found]


def test_an_mpi4py_of_another_mpi_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_mpi(monkeypatch, FakeComm(size=1))
    with pytest.raises(RuntimeError, match="another MPI library"):
        RankEnv.detect(OPENMPI)


def test_open_mpi_without_mpi4py_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(RuntimeError, match="set MASTER_ADDR and MASTER_PORT"):
        RankEnv.detect(OPENMPI)


def test_the_rank_grid_must_fill_the_world() -> None:
    env = detected(TORCHRUN)
    env.check_world(ParallelConfig(dp_size=2, sp_size=2, tp_size=2))
    with pytest.raises(ValueError, match=r"is 6 and world_size=8 \(torchrun\).*start 6 ranks"):
        env.check_world(ParallelConfig(sp_size=3, tp_size=2))


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("node1", ["node1"]),
        ("n[01-03,7]", ["n01", "n02", "n03", "n7"]),
        ("n[09-11],gpu,x[1]y", ["n09", "n10", "n11", "gpu", "x1y"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
    ],
)
def test_slurm_host_lists_are_expanded(text: str, hosts: list[str]) -> None:
    assert slurm.expand_hosts(text) == hosts


def test_slurm_task_counts_are_expanded() -> None:
    assert slurm.expand_counts("2(x3),1") == [2, 2, 2, 1]


def test_slurm_tasks_on_each_node_are_told_apart() -> None:
    nodes = [slurm.tasks_on_node(SRUN | {"SLURM_NODEID": str(node)}) for node in range(4)]
    assert nodes == [2, 2, 2, 1]


def test_every_rank_has_a_thread() -> None:
    assert threads_per_rank(1) >= 1
    assert threads_per_rank(10_000) == 1


def test_a_process_alone_can_start_a_group() -> None:
    init_process_group(RankEnv.alone(), "gloo", timedelta(seconds=20))
    try:
        ones = torch.ones(3)
        dist.all_reduce(ones)
        assert ones.tolist() == [1, 1, 1]
    finally:
        dist.destroy_process_group()
