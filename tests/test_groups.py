"""The rank grid: against numpy's own axes, and as real groups of eight ranks."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_sps2.config import ParallelConfig
from megatron_sps2.parallel.groups import ParallelGroups, rank_grid, slices
from tests.ranks import run_ranks

NAMES = ("dp", "sp", "tp")
GRIDS = [(1, 1, 1), (1, 4, 1), (1, 1, 4), (2, 1, 2), (1, 3, 2), (2, 2, 2), (3, 2, 4)]


def config(grid: tuple[int, int, int]) -> ParallelConfig:
    return ParallelConfig(dp_size=grid[0], sp_size=grid[1], tp_size=grid[2])


@pytest.mark.parametrize("grid", GRIDS)
def test_groups_are_the_slices_of_the_grid(grid: tuple[int, int, int]) -> None:
    ranks = np.arange(np.prod(grid)).reshape(grid)
    for count in range(4):
        for varying in combinations(range(3), count):
            size = int(np.prod([grid[axis] for axis in varying]))
            moved = np.moveaxis(ranks, varying, range(3 - count, 3)).reshape(-1, size)
            want = sorted(tuple(sorted(row)) for row in moved.tolist())
            assert sorted(slices(config(grid), *(NAMES[axis] for axis in varying))) == want


@pytest.mark.parametrize("grid", GRIDS)
def test_tp_ranks_are_neighbours_and_groups_list_ranks_in_order(grid: tuple[int, int, int]) -> None:
    for ranks in slices(config(grid), "tp"):
        assert ranks == tuple(range(ranks[0], ranks[0] + grid[2]))
    for ranks in slices(config(grid), "sp", "tp"):
        assert ranks == tuple(range(ranks[0], ranks[0] + grid[1] * grid[2]))
    assert rank_grid(config(grid)) == [tuple(map(int, i)) for i in np.ndindex(*grid)]


AXES = ("dp", "sp", "tp", "engine", "replicas", "world", "alone")


def sums(skipped: bool) -> dict[str, tuple[int, tuple[int, ...]]]:
    """On a rank of a (2, 2, 2) grid: the sum of 2^rank over every axis, and its ranks."""
    groups = ParallelGroups.create(config((2, 2, 2)))
    found = {}
    for name in AXES:
        axis, value = getattr(groups, name), torch.tensor(1 << dist.get_rank())
        if not skipped:
            dist.all_reduce(value, group=axis.group)
        assert axis.ranks[axis.rank] == dist.get_rank() and axis.size == len(axis.ranks)
        found[name] = (int(value), axis.ranks)
    _check_megatron(groups)
    return found


def _check_megatron(groups: ParallelGroups) -> None:
    """Megatron sees tp and data parallel replicas, and nothing that would make it split a sequence."""
    seen = groups.to_megatron()
    members = {
        name: tuple(dist.get_process_group_ranks(getattr(seen, name)))
        for name in ("tp", "mp", "tp_cp", "cp", "pp", "dp", "dp_cp", "ep", "expt_tp", "embd")
    }
    me = (dist.get_rank(),)
    assert members["tp"] == members["mp"] == members["tp_cp"] == members["expt_tp"] == groups.tp.ranks
    assert members["cp"] == members["pp"] == members["ep"] == members["embd"] == me
    assert members["dp"] == members["dp_cp"] == groups.replicas.ranks


def expected(rank: int) -> dict[str, tuple[int, ...]]:
    dp, sp, tp = rank // 4, rank // 2 % 2, rank % 2
    return {
        "dp": (rank - 4 * dp, rank - 4 * dp + 4),
        "sp": (rank - 2 * sp, rank - 2 * sp + 2),
        "tp": (rank - tp, rank - tp + 1),
        "engine": tuple(range(4 * dp, 4 * dp + 4)),
        "replicas": tuple(range(tp, 8, 2)),
        "world": tuple(range(8)),
        "alone": (rank,),
    }


def test_each_axis_of_eight_ranks_reduces_over_its_own_members() -> None:
    for rank, found in enumerate(run_ranks(8, sums, False)):
        want = expected(rank)
        assert found == {name: (sum(1 << r for r in want[name]), want[name]) for name in AXES}


def test_control_without_the_reduction_the_sums_are_wrong() -> None:
    found = run_ranks(8, sums, True)[5]
    assert [found[name][0] for name in AXES] == [32] * len(AXES)


def world_error() -> str:
    try:
        ParallelGroups.create(ParallelConfig(sp_size=3))
    except RuntimeError as error:
        return str(error)
    return "no error"


def test_a_world_of_another_size_is_refused_with_the_number_to_start() -> None:
    want = "world_size=2 but dp_size=1 x sp_size=3 x tp_size=1 = 3; start 3 ranks"
    assert run_ranks(2, world_error) == [want] * 2
