"""`sps2 plan` and the simulator's commands: what fits, what is chosen and why, what is refused."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_sps2.cli.main import main
from megatron_sps2.cli.serve_arguments import add_serve, schedule_config
from megatron_sps2.csa_setting import PRESETS, save_setting
from megatron_sps2.simulator.arrivals import Arrival
from megatron_sps2.simulator.planner import Targets, choose, why
from megatron_sps2.simulator.setting import Setting
from tests.simulated import LONG_AND_SHORT, base


def test_a_plan_names_what_does_not_fit_and_what_is_worse() -> None:
    settings = [Setting.parse(name) for name in ("sps2-exact", "fcfs")]
    plan = choose(base("llama3-70b"), settings, 8, LONG_AND_SHORT[:6], Targets())
    by_name = {verdict.name: verdict for verdict in plan.verdicts}
    assert plan.chosen.option.memory.fits and not plan.chosen.why_not
    assert "does not fit" in by_name["tp 1 sp 8 dp 1 fcfs"].why_not
    ranks = [verdict.rank for verdict in plan.verdicts if verdict.result]
    assert ranks == sorted(ranks) and plan.chosen.name in why(plan)
    assert all("response time" in each.why_not for each in plan.verdicts[1:] if each.result)


def test_targets_come_before_the_mean() -> None:
    settings, planned = [Setting.parse(name) for name in ("sps2-exact", "fcfs")], LONG_AND_SHORT
    plan = choose(base("llama3-8b"), settings, 1, planned, Targets(tbt_ms=1000.0))
    assert plan.chosen.name == "tp 1 sp 1 dp 1 sps2-exact"
    assert "TBT p99" in plan.verdicts[1].why_not


def test_the_choice_is_the_best_of_those_that_meet_the_targets_and_the_sentence_counts_them() -> None:
    settings = [Setting.parse(name) for name in ("sps2-exact", "fcfs")]
    plan = choose(base("llama3-8b"), settings, 1, LONG_AND_SHORT, Targets(tbt_ms=1000.0))
    assert "of the 1 of 2 options that fit and meet the targets; a rank needs" in why(plan)
    plan = choose(base("llama3-8b"), settings, 1, LONG_AND_SHORT, Targets(tbt_ms=0.1))
    assert "of the 2 of 2 options that fit; a rank" in why(plan)
    assert "but no option meets the targets: TBT p99" in why(plan)


def test_what_was_never_measured_misses_its_target() -> None:
    one_token = [Arrival(arrival_s=0.0, num_prompt_tokens=100, num_output_tokens=1)]
    (missed,) = choose(
        base("llama3-8b"), [Setting.parse("fcfs")], 1, one_token, Targets(tbt_ms=9.0)
    ).chosen.missed
    assert missed == "TBT p99 is not known: no request has one"


def test_failed_requests_are_told_and_none_served_is_refused() -> None:
    huge = Arrival(arrival_s=0.0, num_prompt_tokens=10**6, num_output_tokens=4)
    small, settings = base("llama3-8b", num_blocks=1200), [Setting.parse("fcfs")]
    plan = choose(small, settings, 1, [*LONG_AND_SHORT[:3], huge], Targets())
    assert "but 1 of 4 requests failed, and no option serves more" in why(plan)
    with pytest.raises(ValueError, match="none of 1 requests was served by any of 1 options"):
        choose(small, settings, 1, [huge], Targets())


def test_sps2_aims_for_the_target_between_tokens_and_the_others_know_none() -> None:
    aims = {
        name: replace(
            base("llama3-8b", tbt_slo_ms=80.0), setting=Setting.parse(name)
        ).setup.schedule.tbt_slo_ms
        for name in ("sps2-exact", "fcfs", "sarathi-512")
    }
    assert aims == {"sps2-exact": 80.0, "fcfs": None, "sarathi-512": None}


def test_an_fp8_cache_holds_more_tokens_on_the_same_devices() -> None:
    whole, fp8 = (base("llama3-8b", kv_cache_dtype=kept).memory for kept in ("auto", "fp8"))
    assert (whole.kv_per_token, fp8.kv_per_token) == (32 * 2 * 8 * 128 * 2, 32 * 2 * 8 * (128 + 4))
    assert whole.weights == fp8.weights and fp8.kv_needed < 0.52 * whole.kv_needed


def test_a_model_that_fits_nowhere_is_refused() -> None:
    with pytest.raises(ValueError, match="fit no layout of 8 devices; the closest"):
        choose(base("llama3-405b"), [Setting.parse("fcfs")], 8, LONG_AND_SHORT[:2], Targets())


def test_a_setting_that_means_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="'sarathi' is not known; use names such as sps2-exact"):
        Setting.parse("sarathi")


@pytest.mark.parametrize("name", ["sps2-exact", "sarathi-512", "fcfs"])
def test_a_setting_is_what_serve_does_where_nothing_is_said(name: str) -> None:
    parser = argparse.ArgumentParser()
    add_serve(parser.add_subparsers(), "serve")
    setting = Setting.parse(name)
    args = parser.parse_args(["serve", "--load", "x", "--policy", setting.policy, "--max-num-seqs", "64"])
    assert setting.schedule(64) == schedule_config(args)


def test_the_commands_write_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,20000,20\n1,500,30\n2,40000,10\n")
    shared = ("--profile", "h100", "--model", "llama3-8b", "--trace", str(trace), "--trace-format", "csv")
    assert main(["simulate", *shared, "--sp", "8", "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["simulated"], found["completed"], found["total_output_tokens"]) == (True, 3, 60)
    assert found["profile_source"] == "data sheet, not measured"
    assert main(["simulate", *shared, "--sp", "8", "--num-kv-blocks", "10", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["failed"] == 2, (
        "the long ones have no room in 10 blocks a rank"
    )
    settings = ("--settings", "sps2-exact,sarathi-512")
    held = {}
    for kept in ("auto", "fp8"):
        assert main(["plan", *shared, *settings, "--kv-cache-dtype", kept, "--json", "-"]) == 0
        plan = json.loads(capsys.readouterr().out)
        held[kept] = plan["choice"]["memory_per_rank"]["kv_tokens"]
    assert held["fp8"] / held["auto"] == pytest.approx(256 / 132, rel=0.01)
    assert plan["choice"]["fits"] and plan["num_devices"] == 8 and all(e["why_not"] for e in plan["others"])


@pytest.mark.parametrize("setting", ["sps2-csa", "sps2-auto"])
def test_a_plan_refuses_a_csa_setting_of_another_model(
    setting: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    floors = ((0.9,),)
    save_setting(replace(PRESETS["default"], floor=None, floors=floors), tmp_path / "of_one_layer.json")
    shared = (
        "--profile",
        "h100",
        "--model",
        "llama3-8b",
        "--trace",
        "1:100-200",
        "--trace-format",
        "synthetic",
    )
    asked = ("--settings", setting, "--csa-setting", str(tmp_path / "of_one_layer.json"))
    assert main(["plan", *shared, *asked]) == 2
    assert "has budgets for 1 layers" in capsys.readouterr().err


def test_a_mistake_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    shared = ("--trace", "1:100-200", "--trace-format", "synthetic")
    assert main(["simulate", "--profile", "b200", "--model", "llama3-8b", *shared]) == 2
    assert "profile 'b200' is none of h100, h200, a100 and no file" in capsys.readouterr().err
    assert main(["simulate", "--profile", "h100", "--model", "llama3-70b", *shared]) == 2
    assert "on each rank; use more --sp or --tp" in capsys.readouterr().err
