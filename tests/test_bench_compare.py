"""`sps2 bench compare` without servers: names of settings, turns, ratios, agreement, tables."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_sps2.bench.agreement import agreement
from megatron_sps2.bench.busy import busy, covered
from megatron_sps2.bench.compare_tables import sheets
from megatron_sps2.bench.comparison import Comparison
from megatron_sps2.bench.fleet import Fleet
from megatron_sps2.bench.ratios import Measured, ratios, ratios_to_bases
from megatron_sps2.bench.record import Record
from megatron_sps2.bench.setting import (
    Setting,
    fitting_layouts,
    parse_definitions,
    parse_settings,
    spread,
)
from megatron_sps2.bench.trace import Planned
from megatron_sps2.bench.turns import Schedule, Turn, parts, replays, rotated, session
from megatron_sps2.bench.workload import WorkloadConfig
from megatron_sps2.config import ModelConfig, ParallelConfig
from tests.sps2_command import make_checkpoint, sps2, words

SP2 = ParallelConfig(sp_size=2)
NAMES = ["sps2-csa", "sps2-exact", "sarathi-512"]


def model(num_heads: int, num_groups: int) -> ModelConfig:
    sizes = {"num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 96, "head_dim": 8, "vocab_size": 251}
    return ModelConfig(**sizes, num_attention_heads=num_heads, num_query_groups=num_groups, max_seq_len=512)


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
    from megatron_sps2.cli.main import parse_args

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
        "sps2-csa@sp2tp1",
        "fcfs@sp2tp1",
        "fcfs@sp1tp2",
    ]
    assert found[-1].serve_flags[:4] == ("--sp", "1", "--tp", "2")


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


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"loads": [0.0]}, "time scale 0.0 must be above 0"),
        ({"loads": [1.0, 1.0]}, "each once"),
        ({"num_rounds": 0}, "--rounds 0 must be at least 1"),
        ({"num_warmups": -1}, "--num-warmups -1"),
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


# Records


def record(index: int, sent: float, times: list[float], tokens: list[str], **changes: Any) -> Record:
    values: dict[str, Any] = {
        "index": index,
        "due_s": sent,
        "num_prompt_tokens": 100,
        "num_asked_tokens": len(times),
        "sent_s": sent,
        "end_s": times[-1] if times else sent,
        "chunk_times": times,
        "chunk_tokens": [1] * len(times),
        "num_output_tokens": len(times),
        "tokens": tokens,
    }
    return Record(**{**values, **changes})


def test_busy_time_is_the_union_of_what_overlaps() -> None:
    assert covered([(0, 2), (1, 3), (5, 6), (5.2, 5.4)]) == 4
    done = [record(0, 0.0, [2.0, 4.0], ["a", "b"]), record(1, 1.0, [3.0, 3.5, 9.0], ["a", "b", "c"])]
    failed = record(2, 0.0, [], [], error="HTTP 500")
    found = busy([*done, failed])
    # Prompts waited from 0 to 3 s, answers ran from 2 to 9 s.
    assert (found.prefill_throughput, found.decode_throughput) == (200 / 3, 3 / 7)
    assert (found + found).prefill_throughput == 200 / 3
    assert busy([failed]).prefill_throughput == 0


def test_agreement_counts_until_the_first_difference() -> None:
    exact = {1: "abcd", 2: "abcd", 3: "abcd", 4: "abcd"}
    found = agreement({1: "abcd", 2: "abxd", 3: "xbcd", 5: "abcd"}, exact)
    assert (found.num_requests, found.first_token, found.whole) == (3, 2 / 3, 1 / 3)
    assert found.tokens_until_difference == (4 + 2 + 0) / 12
    assert agreement({5: "a"}, exact).whole is None
    # A shorter answer that is equal so far is not the same answer.
    assert agreement({1: "abc"}, exact).whole == 0


def settings(*names: str) -> list[Setting]:
    return parse_settings(",".join(names), SP2)


def turn(setting: str, number: int, ttft: float, tokens: str, **changes: Any) -> Turn:
    records = [record(0, 0.0, [ttft, ttft + 1, ttft + 2], list(tokens), **changes)]
    return Turn(load=1.0, round=number, setting=setting, records=records)


def test_results_pool_rounds_and_compare_answers_with_exact() -> None:
    turns = [
        turn("sps2-csa", 0, 1.0, "abc", extras={"csa": {"kept_mass": 0.9}}),
        turn("sps2-csa", 1, 3.0, "abc", extras={"csa": {"kept_mass": 0.7}}),
        *(turn("sps2-exact", i, 4.0, "abx") for i in (0, 1)),
        *(turn("sarathi-512", i, 8.0, "abx") for i in (0, 1)),
    ]
    found = Comparison(settings(*NAMES), turns).to_json()
    csa, exact, sarathi = found["results"]
    assert (csa["completed"], csa["mean_ttft_ms"], csa["duration"]) == (2, 2000, 3.0 + 5.0)
    assert csa["mean_kept_mass"] == pytest.approx(0.8) and exact["mean_kept_mass"] is None
    assert csa["agreement"]["tokens_until_difference"] == pytest.approx(2 / 3)
    assert (sarathi["agreement"]["whole"], exact["agreement"]) == (1.0, None)
    ttft = found["ratios_to_sarathi"]["1"]["to_best"]["sps2-csa"]["ttft"]["mean"]
    assert ttft == {"ratio": 4.0, "min": pytest.approx(8 / 3), "max": 8.0}
    titles = [sheet.title for sheet in sheets(found)]
    assert len(titles) == 4 and titles[-1].startswith("As the paper has it")
    assert "4.00x (2.67-8.00)" in [cell for row in sheets(found)[-1].rows for cell in row]


def test_a_comparison_cut_short_keeps_the_rounds_that_all_have_taken() -> None:
    turns = [turn("sps2-exact", 0, 1.0, "abc"), turn("fcfs", 0, 2.0, "abc"), turn("fcfs", 1, 9.0, "abc")]
    found = Comparison(settings("sps2-exact", "fcfs"), turns).to_json()
    assert [each["completed"] for each in found["results"]] == [1, 1]
    assert [sheet.title for sheet in sheets(found)] == [
        "Arrival times x 1",
        "Greedy answers beside those of sps2-exact",
    ]


def test_a_setting_whose_requests_all_failed_has_results_and_no_ratios() -> None:
    failed = Turn(load=1.0, round=0, setting="sps2-csa", records=[record(0, 0.0, [], [], error="HTTP 500")])
    found = Comparison(settings("sps2-csa", "sarathi-512"), [failed, turn("sarathi-512", 0, 1.0, "abc")])
    results = found.to_json()
    assert results["results"][0]["failed"] == 1
    assert results["ratios_to_sarathi"]["1"]["to_best"]["sps2-csa"]["ttft"]["mean"]["ratio"] is None
    assert sheets(results)


# The fleet


def test_a_server_that_does_not_start_is_named_with_the_end_of_its_log(tmp_path: Path) -> None:
    with (
        Fleet({"sps2-csa": ("--checkpoint", str(tmp_path / "none"))}) as fleet,
        pytest.raises(RuntimeError, match="setting sps2-csa did not start.*exit code 2.*\n.*does not exist"),
    ):
        fleet.start()


# The command, with two real servers


def test_one_run_gives_ratios_answers_that_agree_and_a_page(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 40 * i, "input_length": 700 + 90 * i, "output_length": 6, "hash_ids": [0, i + 1]}
        for i in range(4)
    ]
    (tmp_path / "trace.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "text").write_text(words(3 + i * i % 240 for i in range(900)))
    done = sps2(
        *("bench", "compare", "--checkpoint", make_checkpoint(tmp_path, num_hidden_layers=2)),
        *("--settings", "sps2-exact,sarathi-64", "--trace", tmp_path / "trace.jsonl"),
        *("--text", tmp_path / "text", "--length-scale", 0.5, "--rounds", 2, "--loads", "1,0.5"),
        *("--num-warmups", 1, "--json", tmp_path / "out.json", "--html", tmp_path / "out.html"),
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("2 of 2 answered") == 8 and "Traceback" not in done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert [(each["load"], each["setting"], each["completed"]) for each in found["results"]] == [
        (load, name, 4) for load in (1.0, 0.5) for name in ("sps2-exact", "sarathi-64")
    ]
    for each in found["results"]:
        assert (each["total_input_tokens"], each["total_output_tokens"]) == (1670, 12)
    # Two ways of exact attention in float32; random tokens of a random model would not agree by chance.
    assert [each["agreement"]["whole"] for each in found["results"][1::2]] == [1.0, 1.0]
    ratio = found["ratios_to_sarathi"]["0.5"]["to_best"]["sps2-exact"]["e2e"]["mean"]
    assert 0 < ratio["min"] <= ratio["ratio"] <= ratio["max"]
    assert found["rounds"] == 2 and "--policy sarathi" in found["settings"]["sarathi-64"]
    assert (tmp_path / "out.html").read_text().count("<svg") == 3
    assert "As the paper has it" in done.stdout
