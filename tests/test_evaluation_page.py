"""The evaluation's page: tables from files of measurements, each in its own place."""

from __future__ import annotations

import re

import pytest

from benchmarks import evaluation

PAGE = "before\n<!-- peers -->\nold\n<!-- end -->\nbetween\n<!-- mooncake -->\n<!-- end -->\nafter\n"


def test_each_table_replaces_what_stood_in_its_place_and_nothing_else() -> None:
    page = evaluation.fill(PAGE, {"peers": "| new \\1 |"})
    assert page == PAGE.replace("old", "| new \\1 |")
    assert evaluation.fill(page, {"peers": "| new \\1 |"}) == page


def test_a_table_without_a_place_is_named() -> None:
    with pytest.raises(ValueError, match="<!-- simulator_error -->"):
        evaluation.fill(PAGE, {"simulator_error": ""})


def test_the_page_has_a_place_for_every_table() -> None:
    page = evaluation.PAGE.read_text("utf-8")
    places = re.findall(r"<!-- (\w+) -->\n", page)
    assert sorted(places) == sorted([*evaluation.WRITERS, *["end"] * len(evaluation.WRITERS)])


def test_errors_of_the_simulator_are_counted_against_the_goal() -> None:
    row = {"sp": 2, "policy": "sps2", "trace": "held out", "metric": "TTFT p50, ms", "rounds apart": 0.1}
    rows = [{**row, "real": 100.0, "simulated": 100 * (1 + error), "error": error} for error in (0.2, -0.21)]
    text = evaluation.simulator_error([{"rows": rows}])
    assert "| 2 | sps2 | held out | TTFT p50, ms | 100.0 | 79.0 | -21.0% | 10.0% |" in text
    assert "1 of 2 are within 20%" in text
