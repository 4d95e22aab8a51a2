"""`sps2 bench compare` without servers: names of settings, turns, ratios."""

import math
from dataclasses import replace
from typing import Any

import pytest

from megatron_sps2.bench.arrivals import ArrivalConfig
from megatron_sps2.bench.ratios import Measured, ratios, ratios_to_bases
from megatron_sps2.bench.setting import (
    fitting_layouts,
    parse_definitions,
    parse_settings,
    spread,
)
from megatron_sps2.bench.trace import Planned
from megatron_sps2.bench.turns import Schedule, parts, replays, rotated, session
from megatron_sps2.bench.workload import WorkloadConfig
from megatron_sps2.cli.main import parse_args
from megatron_sps2.config import ParallelConfig
from tests.compared import NAMES, SP2, model

# Settings


def test_a_name_gives_the_flags_of_its_server() -> None:
    flags = {each.name: " ".join(each.serve_flags) for each in parse_settings(
        "sps2-csa,sps2-csa-fast, sps2-exact,sps2-auto,sarathi-2048,fcfs,fcfs-4096,sps2-csa@sp1tp2", SP2
    )}  # fmt: skip
    assert flags == {
        "sps2-csa": "--sp 2 --tp 1 --policy sps2 --attention csa",
        "sps2-csa-fast": "--sp 2 --tp 1 --policy sps2 --attention csa --csa-setting fast",
        "sps2-exact": "--sp 2 --tp 1 --policy sps2 --attention exact",
        "sps2-auto": "--sp 2 --tp 1 --policy sps2 --attention auto",
        "sarathi-2048": "--sp 2 --tp 1 --policy sarathi --attention exact --max-num-batched-tokens 2048",
        "fcfs": "--sp 2 --tp 1 --policy fcfs --attention exact",
        "fcfs-4096": "--sp 2 --tp 1 --policy fcfs --attention exact --max-num-batched-tokens 4096",
        "sps2-csa@sp1tp2": "--sp 1 --tp 2 --policy sps2 --attention csa",
    }


def test_every_setting_is_what_sps2_serve_takes() -> None:
    for each in parse_settings("sps2-csa-careful,sps2-auto,sarathi-512@sp1tp2,fcfs-64", SP2):
        args = parse_args(["serve", "--checkpoint", "c", *each.serve_flags])
        assert each.is_sarathi == (args.policy == "sarathi")


def test_a_setting_of_the_users_own_is_what_its_flags_say() -> None:
    defined = parse_definitions(["slo=--policy sps2 --tbt-slo-ms 200", "chunky=--policy=sarathi"])
    slo, chunky = parse_settings("slo@sp1tp2,chunky", SP2, defined)
    assert slo.serve_flags == ("--sp", "1", "--tp", "2", "--policy", "sps2", "--tbt-slo-ms", "200")
    assert (slo.is_sarathi, chunky.is_sarathi) == (False, True)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("vllm", "setting 'vllm' is not known; use sps2-exact"),
        ("sarathi", "setting 'sarathi' is not known"),
        ("sarathi-0", "setting 'sarathi-0' is not known"),
        ("sps2-csa-fsat", "presets: default"),
        ("sps2-csa@tp2", "layout 'tp2' must be spPtpT, as in sps2-csa@sp1tp2"),
        ("fcfs,fcfs", "names fcfs more than once"),
        (" ,", "names none"),
    ],
)
def test_a_name_that_is_not_understood_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_settings(text, SP2)


def test_layouts_that_the_model_does_not_allow_are_left_out_with_the_reason() -> None:
    fit, left_out = fitting_layouts(4, model(num_heads=6, num_groups=2))
    assert [(each.sp_size, each.tp_size) for each in fit] == [(4, 1), (2, 2)]
    assert list(left_out) == ["sp1tp4"] and "tp_size=4 does not divide" in left_out["sp1tp4"]


def test_settings_spread_over_layouts_unless_they_name_one() -> None:
    layouts, _ = fitting_layouts(2, model(num_heads=4, num_groups=2))
    found = spread(parse_settings("sps2-csa@sp1tp2,sps2-csa,fcfs", SP2), layouts)
    assert [each.name for each in found] == [
        "sps2-csa@sp1tp2",
        "sps2-csa",
        "fcfs",
        "fcfs@sp1tp2",
    ]
    assert found[-1].serve_flags[:4] == ("--sp", "1", "--tp", "2")
    only_sp = spread(parse_settings("fcfs", ParallelConfig(sp_size=1, tp_size=2)), [SP2])
    assert [each.name for each in only_sp] == ["fcfs@sp2tp1"]


# Turns


def trace(count: int) -> list[Planned]:
    return [
        Planned(arrival_s=10.0 + i, num_prompt_tokens=600, num_output_tokens=5, hash_ids=(0, i + 1))
        for i in range(count)
    ]


def schedule(**changes: Any) -> Schedule:
    values = {"settings": NAMES, "loads": [2.0, 1.0], "num_rounds": 3, "workload": WorkloadConfig(seed=1)}
    return Schedule(**{**values, **changes})


def test_every_part_of_the_trace_begins_at_its_own_start() -> None:
    cut = parts(trace(7), 3)
    assert sorted(map(len, cut)) == [2, 2, 3]
    assert [part[0].arrival_s for part in cut] == [0, 0, 0]
    assert [each.hash_ids for part in cut for each in part] == [each.hash_ids for each in trace(7)]
    with pytest.raises(ValueError, match="2 requests cannot be cut into 3 rounds"):
        parts(trace(2), 3)


def test_each_setting_takes_each_place_once_in_as_many_rounds_as_settings() -> None:
    found = list(replays(schedule(), trace(6)))
    for load in (2.0, 1.0):
        orders = [replay.order for replay in found if replay.load == load]
        for place in range(3):
            assert {order[place] for order in orders} == set(NAMES)
    assert rotated(["a", "b"], 3) == ["b", "a"]


def test_a_prefix_is_shared_within_a_round_and_never_across_rounds_or_loads() -> None:
    prefixes = list[tuple[int, ...]]()
    for replay in replays(schedule(), trace(6)):
        mine = {tuple(ask.prompt[:512]) for ask in session(schedule(), replay, "").asks(replay.salt)}
        assert len(mine) == 1  # hash id 0 of this round
        prefixes += mine
    assert len(set(prefixes)) == len(prefixes) == 6


def test_a_load_stretches_arrivals_and_nothing_else() -> None:
    by_load = {each.load: session(schedule(), each, "").asks() for each in replays(schedule(), trace(9))}
    assert [ask.arrival_s for ask in by_load[1.0]] == [0, 1, 2]
    assert [ask.arrival_s for ask in by_load[2.0]] == [0, 2, 4]
    assert [len(ask.prompt) for ask in by_load[2.0]] == [len(ask.prompt) for ask in by_load[1.0]]


@pytest.mark.parametrize("kind", ["trace", "poisson", "constant"])
def test_a_load_divides_a_rate_that_is_given(kind: str) -> None:
    rated = schedule(arrivals=ArrivalConfig(kind=kind, request_rate=0.5, seed=3))
    ends = {
        (each.round, each.load): session(rated, each, "").times()[-1] for each in replays(rated, trace(9))
    }
    for number in range(3):
        assert ends[number, 1.0] == pytest.approx(4.0)  # 3 requests at 0.5 a second
        assert ends[number, 2.0] == pytest.approx(8.0)


def test_rounds_have_arrivals_of_their_own_and_settings_the_same() -> None:
    rated = schedule(arrivals=ArrivalConfig(kind="poisson", request_rate=0.5, seed=3))
    times = [session(rated, each, "").times() for each in replays(rated, trace(9)) if each.load == 1.0]
    assert len({tuple(each) for each in times}) == len(times) == 3


def test_loads_of_requests_that_all_come_at_once_are_refused() -> None:
    at_once = [replace(each, arrival_s=0.0) for each in trace(6)]
    with pytest.raises(ValueError, match="all requests come at once"):
        list(replays(schedule(), at_once))
    rated = schedule(arrivals=ArrivalConfig(kind="poisson", request_rate=1.0))
    assert len(list(replays(rated, at_once))) == 6


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"loads": [0.0]}, "time scale 0.0 must be above 0"),
        ({"loads": [1.0, 1.0]}, "each once"),
        ({"num_rounds": 0}, "--rounds 0 must be at least 1"),
        ({"num_warmups": -1}, "--num-warmups -1"),
        ({"arrivals": ArrivalConfig(kind="closed")}, "closed arrivals have one load"),
    ],
)
def test_a_schedule_that_cannot_be_run_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        schedule(**changes)


# Ratios


def summary(mean: float | None, throughput: float) -> dict[str, float | None]:
    times = {f"{stat}_{key}_ms": mean for stat in ("mean", "p50", "p90", "p99") for key in (
        "ttft", "itl", "tpot", "e2el"
    )}  # fmt: skip
    kinds = ("prefill_throughput", "decode_throughput")
    return {**times, **{f"{kind}{tail}": throughput for kind in kinds for tail in ("", "_busy")}}


def measured(mean: float | None, throughput: float, *rounds: float) -> Measured:
    return Measured(pooled=summary(mean, throughput), rounds=[summary(each, throughput) for each in rounds])


def test_ratios_are_above_one_for_the_better_setting() -> None:
    found = ratios(measured(10.0, 30.0, 8.0, 12.0), measured(20.0, 60.0, 24.0, 18.0))
    assert found["ttft"]["p99"] == {"ratio": 2.0, "min": 1.5, "max": 3.0}
    assert found["e2e"]["mean"]["ratio"] == 2.0
    assert found["decode_throughput"] == {"ratio": 0.5, "min": 0.5, "max": 0.5}


def test_a_ratio_with_nothing_measured_is_none() -> None:
    found = ratios(measured(None, 0.0, 1.0), measured(20.0, 0.0, math.nan))
    assert found["tbt"]["mean"] == found["prefill_throughput"] == {"ratio": None, "min": None, "max": None}


def test_the_base_is_the_sarathi_with_the_lowest_response_time_and_each_by_name() -> None:
    every = {"sps2": measured(5.0, 1, 5), "s-512": measured(20.0, 1, 20), "s-2048": measured(15.0, 1, 15)}
    found = ratios_to_bases(every, ["s-512", "s-2048"])
    assert found["best"] == "s-2048"
    assert found["to_best"]["sps2"]["ttft"]["mean"]["ratio"] == 3.0
    assert found["to"]["s-512"]["sps2"]["ttft"]["mean"]["ratio"] == 4.0
    assert set(found["to"]["s-512"]) == {"sps2", "s-2048"}
    assert ratios_to_bases({"sps2": every["sps2"]}, []) == {"best": None, "to_best": {}, "to": {}}
