"""Which device a rank takes and what carries its messages; the devices are counted, never used."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_sps2.cli.device import pick_backend, pick_device, ranks_per_device
from megatron_sps2.cli.layout import _free_bytes
from megatron_sps2.parallel.groups import world_axis
from megatron_sps2.parallel.probe import Pair, measure_pairs
from megatron_sps2.parallel.rank_env import RankEnv
from tests.ranks import run_ranks
from tests.sps2_command import sps2


def rank(local_rank: int, local_world_size: int = 4) -> RankEnv:
    return replace(
        RankEnv.alone(),
        rank=local_rank,
        world_size=local_world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
    )


@pytest.fixture
def num_devices(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[int]:
    """A host with request.param CUDA devices -> those that were made the current one."""
    chosen = list[int]()
    monkeypatch.setattr("torch.cuda.device_count", lambda: request.param)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    return chosen


@pytest.mark.parametrize("num_devices", [2], indirect=True)
def test_over_gloo_ranks_share_devices_in_turn(num_devices: list[int]) -> None:
    found = [pick_device("cuda", rank(i), "gloo") for i in range(4)]
    assert found == ["cuda:0", "cuda:1", "cuda:0", "cuda:1"] and num_devices == [0, 1, 0, 1]


@pytest.mark.parametrize("backend", ["auto", "nccl"])
@pytest.mark.parametrize("num_devices", [2], indirect=True)
def test_nccl_wants_a_device_for_every_rank_and_names_the_way_out(
    num_devices: list[int], backend: str
) -> None:
    assert [pick_device("auto", rank(i), backend) for i in range(2)] == ["cuda:0", "cuda:1"]
    with pytest.raises(ValueError, match=r"2 CUDA devices.*local rank 2 alone.*--backend gloo"):
        pick_device("auto", rank(2), backend)
    assert num_devices == [0, 1]


@pytest.mark.parametrize("num_devices", [0], indirect=True)
def test_a_host_without_devices_is_a_cpu_and_refuses_cuda(num_devices: list[int]) -> None:
    assert pick_device("auto", rank(3)) == "cpu"
    with pytest.raises(ValueError, match="0 CUDA devices; use --device cpu"):
        pick_device("cuda", rank(0))


@pytest.mark.parametrize("num_devices", [1], indirect=True)
def test_a_task_that_slurm_shows_its_own_device_alone_shares_it_with_nobody(
    num_devices: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "1")
    bound = replace(rank(3), launcher="slurm")
    assert pick_device("cuda", bound) == "cuda:0" and ranks_per_device(bound, 1) == 1
    assert (ranks_per_device(rank(0), 1), ranks_per_device(rank(0), 3)) == (4, 2)


@pytest.mark.parametrize("num_devices", [2], indirect=True)
def test_ranks_that_share_a_device_count_on_their_share_of_its_memory(
    num_devices: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (80_000, 90_000))
    assert _free_bytes("cuda:1", rank(0, local_world_size=2)) == 80_000
    assert _free_bytes("cuda:1", rank(0, local_world_size=5)) == 26_666


def test_the_backend_follows_the_device() -> None:
    assert pick_backend("auto", "cuda:1") == "nccl" and pick_backend("gloo", "cuda:1") == "gloo"
    assert pick_backend("auto", "cpu") == pick_backend("gloo", "cpu") == "gloo"


def test_nccl_on_a_cpu_is_refused_before_ranks_meet() -> None:
    done = sps2("doctor", "--world", "--device", "cpu", "--backend", "nccl")
    assert done.returncode == 2
    assert "--backend nccl sends between CUDA devices and ranks here use cpu" in done.stderr


def _pairs_on_a_device() -> list[Pair]:
    return measure_pairs(world_axis(), "meta", 1000, str)  # whose tensors no network can send


def test_gloo_pairs_are_measured_in_host_memory() -> None:
    for pairs in run_ranks(2, _pairs_on_a_device):
        assert [pair.ranks for pair in pairs] == [(0, 1)]
