"""`sps2 doctor --world`: what real ranks measure of each other, and what is made of it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_sps2.cli.problems import (
    Need,
    clock_warnings,
    link_warnings,
    memory_problems,
    reach_problems,
    spell_ranks,
    version_problems,
)
from megatron_sps2.parallel import probe
from megatron_sps2.parallel.groups import Axis, world_axis
from megatron_sps2.parallel.host import _group_limits, host_memory
from megatron_sps2.parallel.probe import Clock, Pair, clocks, measure_pairs, rounds, unreached
from tests.ranks import RankFailed, run_ranks
from tests.sps2_command import make_checkpoint, sps2

HOSTS = ("a", "a", "b", "b")
GIB = 2**30
# A request of this length of the model below has a KV cache of terabytes.
LONGEST = 2**31


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("doctor"), max_position_embeddings=LONGEST)


@pytest.fixture(scope="module")
def found(checkpoint: Path) -> dict[str, Any]:
    """Of two ranks in good health."""
    flags = ("--checkpoint", checkpoint, "--max-model-len", 1000, "--sp", 2, "--megabytes", 2)
    done = sps2("doctor", "--world", *flags, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    world: dict[str, Any] = json.loads(done.stdout)
    return world


# Real ranks.


def test_the_doctor_says_who_is_where(found: dict[str, Any]) -> None:
    assert [rank["rank"] for rank in found["ranks"]] == [0, 1]
    assert [rank["sp_rank"] for rank in found["ranks"]] == [0, 1]
    assert {rank["launcher"] for rank in found["ranks"]} == {"local"}
    assert len({rank["pid"] for rank in found["ranks"]}) == 2
    assert all(rank["device"] == "cpu" and rank["threads"] == 1 for rank in found["ranks"])


def test_the_doctor_measures_every_axis_and_pair(found: dict[str, Any]) -> None:
    assert set(found["axes"]) == {"sp", "world"}  # tp and dp have one rank
    for axis in found["axes"].values():
        assert axis["size"] == 2 and axis["mb_per_s"] > 0 and 0 < axis["latency_us"] < 1e6
        assert axis["mb_per_s"] == axis["mb_per_s_by_rank"][axis["slowest_rank"]]
    assert [pair["ranks"] for pair in found["pairs"]] == [[0, 1]]
    assert found["pairs"][0]["mb_per_s"] > 0 and found["pairs"][0]["latency_us"] > 0
    assert found["unreached"] == [[], []]


def test_two_ranks_of_one_host_have_one_clock(found: dict[str, Any]) -> None:
    (clock,) = found["clocks"]
    assert clock["rank"] == 1 and abs(clock["offset_ms"]) <= clock["plus_minus_ms"] + 1


def test_a_sound_world_has_no_problems(found: dict[str, Any]) -> None:
    assert (found["problems"], found["warnings"]) == ([], [])
    assert found["versions"][0] == found["versions"][1] and found["versions"][0]["torch"][0].isdecimal()
    assert all(0 < memory["needed"] < memory["free"] <= memory["total"] for memory in found["memory"])


def test_memory_that_does_not_fit_is_a_problem_and_exit_code_1(checkpoint: Path) -> None:
    flags = ("--checkpoint", checkpoint, "--max-model-len", LONGEST, "--sp", 2, "--megabytes", 1)
    done = sps2("doctor", "--world", *flags)
    assert (done.returncode, done.stderr) == (1, "")
    assert (
        "problem: ranks 0-1 need " in done.stdout and "for a request of 2,147,483,648 tokens" in done.stdout
    )
    assert "slowest pair: rank 0 (host " in done.stdout and "no problem found" not in done.stdout


def test_a_size_that_is_no_size_is_refused() -> None:
    done = sps2("doctor", "--world", "--sp", 2, "--megabytes", 0)
    assert done.returncode == 2 and "--megabytes 0.0 must be above 0 and finite" in done.stderr


def _late_clock() -> list[Clock]:
    axis, real = world_axis(), time.time
    if axis.rank == 1:
        probe.time.time = lambda: real() + 5  # type: ignore[attr-defined]
    return clocks(measure_pairs(axis, "cpu", 1000, str))


def test_control_a_clock_that_is_ahead_is_measured_and_named() -> None:
    first, second = run_ranks(2, _late_clock)
    assert first == second and first[0].rank == 1
    assert abs(first[0].offset_ms - 5000) <= first[0].plus_minus_ms + 1
    (warning,) = clock_warnings(first, ("a", "b"))
    assert warning.startswith("the clock of rank 1 (host b) is 5,00") and "ahead of that of rank 0" in warning


def _two_that_lose_each_other() -> list[Pair]:
    axis = world_axis()
    return measure_pairs(axis, "cpu", 1000, lambda rank: f"rank {rank} (host {HOSTS[2 * rank]})")


def _send_fails(*args: Any, **more: Any) -> None:
    raise RuntimeError("Connection reset by peer\nmore")


def _broken_pair() -> list[Pair]:
    probe.dist.send = _send_fails  # type: ignore[attr-defined]
    return _two_that_lose_each_other()


def test_two_ranks_that_lose_each_other_are_named() -> None:
    with pytest.raises(
        RankFailed, match=r"\(host a\) and rank 1 \(host b\) lost each other \(Connection reset"
    ):
        run_ranks(2, _broken_pair)


def _hears_wrongly() -> list[int]:
    axis = world_axis()
    claimed = Axis(axis.group, 0, axis.size, axis.ranks)  # rank 1 sends what rank 0 would send
    return unreached(claimed, "cpu")


def test_control_a_message_that_arrives_wrongly_is_noticed() -> None:
    assert run_ranks(2, _hears_wrongly) == [[1], [0, 1]]


# Numbers judged, without ranks.


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 8])
def test_each_two_ranks_meet_once_and_no_rank_twice_in_a_round(size: int) -> None:
    met = [pair for pairs in rounds(size) for pair in pairs]
    assert sorted(met) == [(a, b) for a in range(size) for b in range(a + 1, size)]
    assert all(len({rank for pair in pairs for rank in pair}) == 2 * len(pairs) for pairs in rounds(size))


def test_in_a_large_world_rank_0_meets_each_other_rank() -> None:
    assert rounds(100) == [[(0, rank)] for rank in range(1, 100)]


def test_a_rank_with_another_version_is_named() -> None:
    versions = [{"torch": "2.13", "numpy": "2.0"} for _ in HOSTS]
    assert version_problems(versions, HOSTS) == []
    versions[3] = {"torch": "2.12"}
    assert version_problems(versions, HOSTS) == [
        "torch is 2.12 on rank 3 (host b) and 2.13 elsewhere; every rank must have the same: install torch "
        "2.13 there",
        "numpy is not installed on rank 3 (host b) and 2.0 elsewhere; every rank must have the same: install "
        "numpy 2.0 there",
    ]
    nowhere = version_problems([{"torch": "not installed"}] * 2, ("a", "a"))
    assert nowhere == ["torch is not installed on any rank; ranks cannot compute without it"]


def needs(free: dict[str, int]) -> list[Need]:
    return [
        Need(rank=rank, place=f"host {host}", needed_bytes=10 * GIB, free_bytes=free[host])
        for rank, host in enumerate(HOSTS)
    ]


def test_ranks_of_a_host_must_fit_its_memory_together() -> None:
    assert memory_problems(needs({"a": 20 * GIB, "b": 20 * GIB}), 4096) == []
    (problem,) = memory_problems(needs({"a": 20 * GIB, "b": 19 * GIB}), 4096)
    assert problem.startswith(
        "ranks 2-3 need 20.0 GiB on host b for a request of 4,096 tokens and 19.0 GiB are"
    )
    assert "--max-model-len" in problem


def test_a_message_that_did_not_arrive_names_both_ranks() -> None:
    (problem,) = reach_problems([[], [], [0], []], HOSTS)
    assert problem.startswith("rank 2 (host b) did not get what rank 0 (host a) sent; every rank must")


def test_a_clock_is_warned_of_when_it_is_surely_off() -> None:
    def off(by: float) -> list[str]:
        return clock_warnings([Clock(rank=2, offset_ms=by, plus_minus_ms=3)], HOSTS)

    assert off(102) == off(-102) == []
    (warning,) = off(-1500)
    assert warning.startswith(
        "the clock of rank 2 (host b) is 1,500 ms behind that of rank 0 (host a), +- 3.0"
    )


def pair(a: int, b: int, mb_per_s: float) -> Pair:
    return Pair(ranks=(a, b), latency_us=10, mb_per_s=mb_per_s, offset_ms=0, plus_minus_ms=1)


def test_a_link_is_slow_beside_links_of_its_kind() -> None:
    between = [pair(0, 2, 100), pair(0, 3, 100), pair(1, 2, 100)]
    within = [pair(0, 1, 5000), pair(2, 3, 5000)]
    assert link_warnings([*within, *between, pair(1, 3, 90)], HOSTS) == []
    (warning,) = link_warnings([*within, *between, pair(1, 3, 20)], HOSTS)
    assert warning.startswith(
        "between rank 1 (host a) and rank 3 (host b) 20 MB/s pass and 100 between most ranks of two hosts"
    )


def test_ranks_are_spelled_in_runs() -> None:
    assert spell_ranks([2]) == "rank 2"
    assert spell_ranks([3, 0, 1]) == "ranks 0-1 and 3"
    assert spell_ranks([0, 2, 3], HOSTS) == "ranks 0 and 2-3 (hosts a, b)"


def test_memory_is_that_of_the_narrowest_group_around_the_process(tmp_path: Path) -> None:
    group = tmp_path / "job" / "step"
    group.mkdir(parents=True)
    (tmp_path / "job" / "memory.max").write_text("1000\n")
    (tmp_path / "job" / "memory.current").write_text("700\n")
    (tmp_path / "job" / "memory.stat").write_text("anon 400\ninactive_file 300\n")
    (group / "memory.max").write_text("max\n")
    assert _group_limits(tmp_path, "job/step") == [(600, 1000)]
    assert _group_limits(tmp_path, "") == []
    free, total = host_memory()
    assert 0 < free < total
