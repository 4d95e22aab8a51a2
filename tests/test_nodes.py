"""Which ranks share a machine, and the cores that each gets there."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_sps2.config import ParallelConfig
from megatron_sps2.parallel.hello import Hello, own_hello
from megatron_sps2.parallel.host import in_order, num_numa_nodes, numa_nodes
from megatron_sps2.parallel.nodes import check_tp_inside_nodes, num_threads, own_cores, split_cores
from megatron_sps2.parallel.rank_env import RankEnv
from tests.sps2_command import ROOT, environ

EIGHT = tuple(range(8))


def hello_on(rank: int, host: str, cores: tuple[int, ...] = EIGHT) -> Hello:
    return dataclasses.replace(own_hello(RankEnv.alone()), rank=rank, host=host, cores=cores)


def test_tp_inside_a_node_is_fine_and_across_nodes_is_refused() -> None:
    hellos = [hello_on(rank, "a" if rank < 3 else "b") for rank in range(6)]
    check_tp_inside_nodes(ParallelConfig(sp_size=2, tp_size=3), hellos)
    check_tp_inside_nodes(ParallelConfig(sp_size=6), hellos)
    with pytest.raises(ValueError, match=r"tp_size=2 would cross nodes \(rank 2 on a, rank 3 on b\)") as told:
        check_tp_inside_nodes(ParallelConfig(sp_size=3, tp_size=2), hellos)
    assert "--tp 3 or a divisor" in str(told.value) and "--allow-tp-across-nodes" in str(told.value)


def test_two_machines_of_one_name_are_two_nodes() -> None:
    hellos = [dataclasses.replace(hello_on(rank, "localhost"), boot=str(rank)) for rank in range(2)]
    with pytest.raises(ValueError, match="tp_size=2 would cross nodes"):
        check_tp_inside_nodes(ParallelConfig(tp_size=2), hellos)


@pytest.mark.parametrize(
    ("num_ranks", "numa", "wanted"),
    [
        (2, [EIGHT], [(0, 1, 2, 3), (4, 5, 6, 7)]),
        (3, [EIGHT], [(0, 1), (2, 3), (4, 5)]),
        (2, [], [(0, 1, 2, 3), (4, 5, 6, 7)]),
        (2, [(0, 2, 4, 6), (1, 3, 5, 7)], [(0, 2, 4, 6), (1, 3, 5, 7)]),
        (4, [(0, 2, 4, 6), (1, 3, 5, 7)], [(0, 2), (4, 6), (1, 3), (5, 7)]),
        (3, [(0, 1, 2, 3), (4, 5, 6, 7)], [(0, 1), (2, 3), (4, 5)]),
        (2, [(0, 1), (8, 9)], [(0, 1, 2, 3), (4, 5, 6, 7)]),  # the nodes tell of other cores than ours
    ],
)
def test_cores_are_shared_out_by_numa_node(
    num_ranks: int, numa: list[tuple[int, ...]], wanted: list[tuple[int, ...]]
) -> None:
    assert split_cores(EIGHT, num_ranks, numa) == wanted


def test_ranks_of_a_node_get_different_cores() -> None:
    hellos = [hello_on(rank, "ab"[rank // 2]) for rank in range(4)]
    found = [own_cores(hello, hellos) or () for hello in hellos]
    assert [len(cores) for cores in found] == [4] * 4
    assert not set(found[0]) & set(found[1]) and set(found[2]) | set(found[3]) == set(EIGHT)


@pytest.mark.parametrize(
    "cores",
    [[(0, 1), (2, 3)], [(0,), (0,)]],
    ids=["bound by the launcher", "fewer cores than ranks"],
)
def test_ranks_are_left_alone_where_binding_would_do_harm(cores: list[tuple[int, ...]]) -> None:
    hellos = [hello_on(rank, "a", cores=mine) for rank, mine in enumerate(cores)]
    assert [own_cores(hello, hellos) for hello in hellos] == [None, None]


def test_threads_are_a_share_of_the_cores_or_what_the_launcher_gave() -> None:
    shared = [hello_on(rank, "a") for rank in range(3)]
    bound = [hello_on(rank, "a", cores=((0, 1, 2), (3, 4))[rank]) for rank in range(2)]
    crowd = [hello_on(rank, "a", cores=(0,)) for rank in range(2)]
    assert [num_threads(ranks[1], ranks) for ranks in (shared, bound, crowd)] == [2, 2, 1]


def test_a_rank_alone_on_its_node_keeps_all_cores() -> None:
    hellos = [hello_on(0, "a"), hello_on(1, "b")]
    assert own_cores(hellos[0], hellos) is None


def test_numa_nodes_are_read(tmp_path: Path) -> None:
    assert numa_nodes(tmp_path) == [] and num_numa_nodes(tmp_path) == 1  # a system that says nothing
    for name, text in (("node0", "0-1,8\n"), ("node1", "2-3\n"), ("node2", "\n"), ("nodes_online", "0-2\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "cpulist").write_text(text)
    assert numa_nodes(tmp_path) == [(0, 1, 8), (2, 3)] and num_numa_nodes(tmp_path) == 2


def test_hardware_threads_of_a_core_are_neighbours(tmp_path: Path) -> None:
    for cpu in range(4):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "core_id").write_text(str(cpu % 2))
        (folder / "physical_package_id").write_text("0")
    assert in_order((0, 1, 2, 3), tmp_path) == (0, 2, 1, 3)


PROGRAM = r"""
import argparse, os, sys
from megatron_sps2.cli.main import parse_args
from megatron_sps2.cli.world import in_local_world

def body(args):
    import torch, torch.distributed as dist
    found = dist.get_rank(), sorted(os.sched_getaffinity(0)), torch.get_num_threads()
    os.write(1, " ".join([*map(str, found), "\n"]).encode())

if __name__ == "__main__":
    args = parse_args(["generate", "--checkpoint", "", "--prompt", "", "--sp", "2", *sys.argv[1:]])
    sys.exit(in_local_world(args, body))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="cores of a process can be set on Linux")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
@pytest.mark.parametrize("flag", ["--bind-cores", "--no-bind-cores"])
def test_real_ranks_keep_to_their_cores(tmp_path: Path, flag: str) -> None:
    """Without OMP_NUM_THREADS: as many threads as cores."""
    (tmp_path / "program.py").write_text(PROGRAM)
    env = environ()
    del env["OMP_NUM_THREADS"]
    command = (sys.executable, str(tmp_path / "program.py"), flag)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stderr
    found = {}
    for line in done.stdout.splitlines():
        rank, _, rest = line.partition(" ")
        cores, _, threads = rest.strip().rpartition(" ")
        found[rank] = set(cores.strip("[]").split(", "))
        assert int(threads) == max(1, len(os.sched_getaffinity(0)) // 2)
    assert bool(found["0"] & found["1"]) == (flag == "--no-bind-cores")
