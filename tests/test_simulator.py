"""The simulator: the engine's own scheduler on a simulated clock, and prices fitted to steps."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sps2.bench.trace import read_trace
from megatron_sps2.bench.workload import WorkloadConfig, build
from megatron_sps2.cli.planned import read_planned
from megatron_sps2.config import CacheConfig, ModelConfig, ParallelConfig, ScheduleConfig
from megatron_sps2.engine.plan import StepPlan
from megatron_sps2.engine.scheduler import Scheduler
from megatron_sps2.simulator.arrivals import Arrival, make_request
from megatron_sps2.simulator.cost import CostModel
from megatron_sps2.simulator.counter import Counter
from megatron_sps2.simulator.data_sheets import SHEETS, load_profile
from megatron_sps2.simulator.fit import Observation, as_profile, columns, fit, non_negative
from megatron_sps2.simulator.profile import DeviceProfile, read_profile, save_profile
from megatron_sps2.simulator.replica import Replica, Setup
from megatron_sps2.simulator.shapes import SHAPES
from megatron_sps2.simulator.simulation import Outcome, simulate
from megatron_sps2.simulator.work import Work
from tests.desk import BLOCK, MODEL, Desk, kind
from tests.simulated import LONG_AND_SHORT, base


def cost_of(model: ModelConfig, parallel: ParallelConfig) -> CostModel:
    counter = Counter(model=model, parallel=parallel, dtype="bfloat16", devices_per_node=8)
    return CostModel(profile=load_profile("h100"), counter=counter)


def run(
    planned: Sequence[Arrival], sp: int = 1, dp: int = 1, num_blocks: int = 6000, **schedule: Any
) -> Outcome:
    parallel, model = ParallelConfig(sp_size=sp, dp_size=dp), SHAPES["llama3-8b"]
    setup = Setup(
        model=model,
        parallel=parallel,
        schedule=ScheduleConfig(**{"max_num_seqs": 32, "max_num_batched_tokens": 8192, **schedule}),
        cache=CacheConfig(num_blocks=num_blocks),
    )
    return simulate(setup, cost_of(model, parallel), planned)


def granted(plan: StepPlan) -> tuple[Any, ...]:
    """A plan's blocks and homes, without the tokens, which mean nothing here."""
    pieces = [(each.request_id, each.start, each.stop, each.home, each.blocks) for each in plan.pieces]
    tokens = [
        (each.request_id, each.position, each.home, each.kv_rank, each.new_block) for each in plan.decode
    ]
    return kind(plan), pieces, tokens, plan.freed


@pytest.mark.parametrize(
    "schedule",
    [
        {"policy": "sps2"},
        {"policy": "sps2", "short_prompt_tokens": 8},
        {"policy": "fcfs"},
        {"policy": "sarathi", "max_num_batched_tokens": 12},
    ],
    ids=str,
)
def test_plans_are_those_of_the_real_scheduler(schedule: dict[str, Any]) -> None:
    """The desk replays every plan on the ranks' tables; both get the same requests in the same order."""
    lengths = [(30, 6), (7, 9), (25, 3), (5, 12), (18, 5), (40, 2)]
    config = ScheduleConfig(**{"max_num_seqs": 4, **schedule})
    cost, seen = cost_of(MODEL, ParallelConfig(sp_size=2)), list[StepPlan]()
    desk = Desk(16, sp_size=2, cost=cost.seconds, **{"max_num_seqs": 4, **schedule})
    cache = CacheConfig(num_blocks=16, block_size=BLOCK)
    setup = Setup(model=MODEL, parallel=ParallelConfig(sp_size=2), schedule=config, cache=cache)
    replica = Replica(setup, cost, seen.append)
    for number, (prompt, answer) in enumerate(lengths):
        desk.add(number, prompt, answer)
        one = Arrival(arrival_s=0.0, num_prompt_tokens=prompt, num_output_tokens=answer)
        replica.submit(make_request(one, number))
    replica.advance(float("inf"))
    assert list(map(granted, seen)) == list(map(granted, desk.run()))


@pytest.mark.parametrize("policy", ["sps2", "fcfs", "sarathi"])
def test_every_request_ends_with_all_its_tokens(policy: str) -> None:
    """With room for one and a half of the long ones, so that some are sent back."""
    outcome = run(LONG_AND_SHORT, num_blocks=1600, policy=policy)
    assert [len(each.token_times) for each in outcome.served] == [40] * 16
    assert all(each.error is None for each in outcome.served)
    assert all(each.ttft > 0 and min(each.gaps) > 0 for each in outcome.served), "time goes forward"


def test_blocks_come_back() -> None:
    setup = Setup(
        model=MODEL,
        parallel=ParallelConfig(sp_size=2),
        schedule=ScheduleConfig(max_num_seqs=4),
        cache=CacheConfig(num_blocks=8, block_size=BLOCK),
    )
    replica = Replica(setup, cost_of(MODEL, setup.parallel))
    for i in range(6):
        replica.submit(make_request(Arrival(arrival_s=0, num_prompt_tokens=20, num_output_tokens=9), i))
    replica.advance(float("inf"))
    assert replica.blocks.num_free_blocks == [8, 8] and not replica.blocks.holders


def test_a_policy_that_does_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scheduler, "schedule", lambda self: StepPlan())
    with pytest.raises(AssertionError, match="policy 'fcfs' has work at 0.0 s and does none"):
        run(LONG_AND_SHORT[:1], policy="fcfs")


def test_a_request_that_fits_no_cache_fails_and_the_others_do_not() -> None:
    huge = Arrival(arrival_s=0.1, num_prompt_tokens=10**6, num_output_tokens=4)
    found = run([*LONG_AND_SHORT[:4], huge]).to_json()
    assert (found["completed"], found["failed"]) == (4, 1)


def test_more_ranks_are_not_slower_for_a_long_prompt() -> None:
    one = [Arrival(arrival_s=0.0, num_prompt_tokens=131072, num_output_tokens=2)]
    ttft = [run(one, sp=sp).served[0].ttft for sp in (1, 2, 4, 8)]
    assert ttft == sorted(ttft, reverse=True) and ttft[0] / ttft[3] > 6


def test_fcfs_lets_answers_wait_for_prompts_and_sps2_does_not() -> None:
    fcfs, sps2 = (run(LONG_AND_SHORT, sp=8, policy=policy).to_json() for policy in ("fcfs", "sps2"))
    assert fcfs["tbt_ms"]["max"] > 5 * sps2["tbt_ms"]["max"]
    assert sps2["num_pauses"] > 0 and fcfs["num_pauses"] == 0


def test_replicas_share_the_load() -> None:
    many = [replace(each, arrival_s=each.arrival_s / 8) for each in LONG_AND_SHORT]
    one, two = run(many), run(many, dp=2)
    assert min(two.busy_s) > 0.3 * sum(two.busy_s)
    assert two.to_json()["e2e_ms"]["mean"] < one.to_json()["e2e_ms"]["mean"]


def test_prompts_with_equal_hash_ids_share_a_prefix() -> None:
    first = Arrival(arrival_s=0, num_prompt_tokens=32768, num_output_tokens=2, hash_ids=tuple(range(64)))
    again, other = replace(first, arrival_s=30), replace(first, arrival_s=30, hash_ids=tuple(range(64, 128)))
    same, new = (run([first, each], prefix_caching=True).served[1].ttft for each in (again, other))
    assert same < new / 10


def test_prompts_share_what_they_share_in_the_bench_whatever_their_lengths(tmp_path: Path) -> None:
    rows = [(1400, (1, 2, 3)), (2000, (1, 2, 9, 10))]
    lines = [
        json.dumps({"timestamp": 0, "input_length": length, "output_length": 1, "hash_ids": hash_ids})
        for length, hash_ids in rows
    ]
    (tmp_path / "trace").write_text("\n".join(lines))
    asked: dict[str, Any] = {"trace": tmp_path / "trace", "trace_format": "mooncake", "num_requests": None}
    args = argparse.Namespace(**asked, seed=0, time_scale=1.0, length_scale=0.05, request_rate=None)
    mine = [make_request(each, i).prompt_ids for i, each in enumerate(read_planned(args, None))]
    bench = build(read_trace(**asked), WorkloadConfig(length_scale=0.05, vocab_size=10**6))
    for one, two in (mine, [each.prompt for each in bench]):
        assert (len(one), len(two)) == (70, 100)
        assert one[:51] == two[:51] and one[51] != two[51], "two blocks of 25.6 tokens"


def planted(count: int = 400) -> list[Observation]:
    """Steps of prompts and answers priced by a known profile, some of them held up."""
    cost, rng = cost_of(SHAPES["llama3-8b"], ParallelConfig(sp_size=2)), np.random.default_rng(0)
    exact = replace(cost, profile=replace(cost.profile, memory_overlap=0.0, exchange_overlap=0.0))
    seen, found = list[StepPlan](), list[Observation]()
    setup = Setup(
        model=SHAPES["llama3-8b"],
        parallel=ParallelConfig(sp_size=2),
        schedule=ScheduleConfig(max_num_seqs=16, short_prompt_tokens=512),
        cache=CacheConfig(num_blocks=6000),
    )
    replica = Replica(setup, exact, seen.append)
    for i in range(40):
        length = int(2 ** rng.uniform(5, 15))
        one = Arrival(arrival_s=0.1 * i, num_prompt_tokens=length, num_output_tokens=int(rng.integers(2, 60)))
        replica.submit(make_request(one, i))
    replica.advance(float("inf"))
    for plan in seen:
        work = exact.counter.work(plan)
        seconds = exact.price(work).total
        if seconds:
            found.append(Observation(work, seconds * (4 if rng.random() < 0.05 else rng.normal(1, 0.02))))
    return found[:count]


def test_fitted_prices_predict_steps_though_some_were_held_up() -> None:
    steps = planted()
    found = fit(steps, num_ranks=2)
    assert found.median_error < 0.03 and found.p90_error < 0.1
    profile = as_profile(
        found, name="x", source="measured", dtype="bfloat16", memory_bytes=1, devices_per_node=2, notes={}
    )
    true = load_profile("h100")
    assert profile.attention_flops["bfloat16"] == pytest.approx(true.attention_flops["bfloat16"], rel=0.1)
    assert profile.matmul_flops["bfloat16"] == pytest.approx(true.matmul_flops["bfloat16"], rel=0.15)


def test_control_a_fit_to_shuffled_seconds_is_far_off() -> None:
    steps = planted()
    seconds = np.random.default_rng(1).permutation([each.seconds for each in steps])
    shuffled = [Observation(each.work, s) for each, s in zip(steps, seconds, strict=True)]
    assert fit(shuffled, num_ranks=2).p90_error > 0.3


def test_links_that_no_step_used_are_named_where_there_are_ranks_to_use_them() -> None:
    quiet = [Observation(without_links(each.work), each.seconds) for each in planted()]
    assert {"intra_bytes", "intra_rounds"} <= set(fit(quiet, num_ranks=2).unpriced)
    assert "intra_bytes" not in fit(quiet, num_ranks=1).unpriced, "one rank has no link"
    assert "intra_bytes" not in fit(planted(), num_ranks=2).unpriced


def without_links(work: Work) -> Work:
    return replace(work, exchange_intra_bytes=0.0, sent_intra_bytes=0.0, intra_rounds=0.0)


def measured_on(sp: int, tp: int) -> DeviceProfile:
    return replace(load_profile("h100"), name="here", source="measured", notes={"sp": sp, "tp": tp})


def test_a_profile_of_one_rank_prices_no_links() -> None:
    deployment = replace(base("llama3-8b"), profile=measured_on(1, 1))
    assert deployment.cost.profile.name == "here"
    with pytest.raises(
        ValueError, match="sp=2 tp=4: .* measured on one rank .* `sps2 profile --sp 2 --tp 4`"
    ):
        assert replace(deployment, parallel=ParallelConfig(sp_size=2, tp_size=4)).cost
    assert replace(deployment, parallel=ParallelConfig(dp_size=2)).cost, "replicas do not talk"


def test_a_profile_of_another_grid_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    for sp in (2, 4):
        assert replace(base("llama3-8b"), profile=measured_on(2, 1), parallel=ParallelConfig(sp_size=sp)).cost
    assert [record.getMessage() for record in caplog.records] == [
        "profile 'here' was measured with sp=2 tp=1, not sp=4 tp=1: what ranks share may differ"
    ]


def test_too_few_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="5 measured steps are too few"):
        fit(planted(5), num_ranks=2)


def test_least_squares_without_negative_prices() -> None:
    rng = np.random.default_rng(2)
    for _ in range(20):
        a, b = rng.normal(size=(12, 4)), rng.normal(size=12)
        x = non_negative(a, b)
        gradient = a.T @ (a @ x - b)
        assert (x >= 0).all() and (gradient > -1e-8).all() and abs(gradient @ x) < 1e-8, "the KKT conditions"


def test_what_is_fitted_is_all_that_is_priced() -> None:
    work = planted(1)[0].work
    price = CostModel(
        profile=replace(load_profile("h100"), memory_overlap=0.0, exchange_overlap=0.0),
        counter=Counter(model=MODEL, parallel=ParallelConfig(), dtype="bfloat16", devices_per_node=8),
    ).price(work)
    priced = columns(work)
    assert price.total > 0 and set(priced) >= {
        "matmul_flops",
        "attention_flops",
        "intra_bytes",
        "intra_rounds",
    }


def test_a_profile_comes_back_from_its_file(tmp_path: Path) -> None:
    for name in SHEETS:
        path = tmp_path / f"{name}.json"
        save_profile(load_profile(name), path)
        assert read_profile(path) == load_profile(str(path)) == load_profile(name)
        assert json.loads(path.read_text())["source"] == "data sheet, not measured"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"weight_bandwidth": 0}, "weight_bandwidth=0 must be a number above 0"),
        ({"memory_overlap": 2}, "memory_overlap=2 must lie between 0 and 1"),
        ({"speed": 1}, r"unknown keys \['speed'\]"),
        ({"intra": {"bandwidth": 1, "latency_s": -1}}, "latency_s=-1 must be a number of at least 0"),
    ],
)
def test_a_wrong_profile_is_named(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = tmp_path / "p.json"
    save_profile(load_profile("a100"), path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=f"p.json: {says}"):
        read_profile(path)
