"""Turns of a comparison to results: busy time, agreement, pooled rounds, tables, the page."""

import pytest

from megatron_sps2.bench.agreement import agreement
from megatron_sps2.bench.busy import busy, covered
from megatron_sps2.bench.compare_page import comparison_page
from megatron_sps2.bench.compare_tables import sheets
from megatron_sps2.bench.comparison import Comparison
from megatron_sps2.bench.turns import Turn
from tests.compared import NAMES, record, settings, turn


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


def test_results_pool_rounds_and_compare_answers_with_exact() -> None:
    turns = [
        turn("sps2-csa", 0, 1.0, "abc", extras={"csa": {"kept_mass": 0.9}}),
        turn("sps2-csa", 1, 3.0, "abc", extras={"csa": {"kept_mass": 0.7}}),
        *(turn("sps2-exact", i, 4.0, "abx") for i in (0, 1)),
        *(turn("sarathi-512", i, 8.0, "abx") for i in (0, 1)),
    ]
    comparison = Comparison(settings(*NAMES), turns)
    found = comparison.to_json()
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
    page = comparison_page(comparison, {**found, "hardware": "an <old> machine"})
    assert page.count("<svg") == 1 and page.count("<caption>") == 4 and "an &lt;old&gt; machine" in page


def test_goodput_is_told_where_limits_are_given() -> None:
    turns = [turn("sps2-exact", 0, 1.0, "abc"), turn("fcfs", 0, 4.0, "abc")]
    for slos, said in (({}, ["-", "-"]), ({"ttft": 2000.0}, ["0.333", "0"])):
        [speed, *_] = sheets(Comparison(settings("sps2-exact", "fcfs"), turns, slos).to_json())
        column = speed.columns.index("within limits/s")
        assert [row[column] for row in speed.rows] == said


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
