"""The results of a comparison -> tables of text, for a terminal and a page alike. Knows neither of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sps2.bench.ratios import PAPER, STATISTICS, THROUGHPUTS, TIMES

TITLES = {
    "ttft": "TTFT",
    "tbt": "TBT",
    "tpot": "TPOT",
    "e2e": "response time",
    "prefill_throughput": "prefill throughput",
    "decode_throughput": "decode throughput",
    "prefill_throughput_busy": "prefill throughput, busy",
    "decode_throughput_busy": "decode throughput, busy",
}
NONE = "-"
Results = Mapping[str, Any]  # as Comparison.to_json gives them


@dataclass(frozen=True, slots=True, kw_only=True)
class Sheet:
    """A table: its title, a line on how to read it, and cells."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    @property
    def lines(self) -> list[Sequence[str]]:
        """The header first."""
        return [self.columns, *self.rows]


def sheets(results: Results) -> list[Sheet]:
    """Of every load: speed and ratios; then accuracy, and the paper's figures beside ours."""
    found = list[Sheet]()
    for load in loads(results):
        found.append(_speed(results, load))
        found += _ratios(results, load)
    return [*found, *_accuracy(results), *_paper(results)]


def loads(results: Results) -> list[float]:
    """The lightest first."""
    return list(dict.fromkeys(each["load"] for each in results["results"]))


def _of(results: Results, load: float) -> list[dict[str, Any]]:
    return [each for each in results["results"] if each["load"] == load]


def _speed(results: Results, load: float) -> Sheet:
    cells: list[tuple[str, Callable[[Results], str]]] = [
        ("TTFT s, mean", lambda one: _seconds(one["mean_ttft_ms"])),
        ("p50", lambda one: _seconds(one["p50_ttft_ms"])),
        ("p99", lambda one: _seconds(one["p99_ttft_ms"])),
        ("TBT ms, mean", lambda one: _number(one["mean_itl_ms"])),
        ("p50", lambda one: _number(one["p50_itl_ms"])),
        ("p99", lambda one: _number(one["p99_itl_ms"])),
        ("E2E s, mean", lambda one: _seconds(one["mean_e2el_ms"])),
        ("p99", lambda one: _seconds(one["p99_e2el_ms"])),
        ("prefill tok/s", lambda one: _number(one["prefill_throughput"])),
        ("busy", lambda one: _number(one["prefill_throughput_busy"])),
        ("decode tok/s", lambda one: _number(one["decode_throughput"])),
        ("busy", lambda one: _number(one["decode_throughput_busy"])),
        ("within limits/s", lambda one: _number(one["request_goodput"])),
        ("cached", _cached),
        ("failed", lambda one: str(one["failed"])),
    ]
    return Sheet(
        title=f"Arrival times x {load:g}",
        note="busy: of the time in which a prompt waited for its first token, or an answer for its last; "
        "within limits: requests that kept every limit of --goodput; "
        "cached: prompt tokens found in the prefix cache",
        columns=["setting", *(title for title, _ in cells)],
        rows=[[one["setting"], *(cell(one) for _, cell in cells)] for one in _of(results, load)],
    )


def _cached(one: Results) -> str:
    """Of the prompts' tokens."""
    return _share(one["total_cached_tokens"] / one["total_input_tokens"] if one["completed"] else None)


def _ratios(results: Results, load: float) -> list[Sheet]:
    """None without a sarathi setting that answered."""
    found = results["ratios_to_sarathi"][f"{load:g}"]
    names = list(found["to_best"])
    rows = [
        [f"{TITLES[key]}, {stat}", *(_ratio(found["to_best"][name][key][stat]) for name in names)]
        for key in TIMES
        for stat in STATISTICS
    ]
    rows += [[TITLES[key], *(_ratio(found["to_best"][name][key]) for name in names)] for key in THROUGHPUTS]
    sheet = Sheet(
        title=f"Times better than {found['best']}, arrival times x {load:g}",
        note=f"{found['best']} has the lowest mean response time of the sarathi settings here; "
        "in brackets the least and the most of single rounds",
        columns=["", *names],
        rows=rows,
    )
    return [sheet] if names else []


def _accuracy(results: Results) -> list[Sheet]:
    compared = [each for each in results["results"] if each["agreement"]]
    if not compared:
        return []
    rows = [
        [
            f"{one['load']:g}",
            one["setting"],
            str(one["agreement"]["num_requests"]),
            *(_share(one["agreement"][key]) for key in ("first_token", "tokens_until_difference", "whole")),
            _share(one["mean_kept_mass"]),
        ]
        for one in compared
    ]
    sheet = Sheet(
        title=f"Greedy answers beside those of {compared[0]['agreement']['reference']}",
        note="Settings with exact attention are the control: what the rounding of another order of work "
        "changes. Teacher-forced perplexity, KL and agreement of CSA: benchmarks/accuracy.py, "
        "benchmarks/RESULTS.md",
        columns=[
            "load",
            "setting",
            "answers",
            "equal first token",
            "equal tokens until the first difference",
            "equal answers",
            "attention kept",
        ],
        rows=rows,
    )
    return [sheet]


def _paper(results: Results) -> list[Sheet]:
    """At the highest load, the settings that are not sarathi's."""
    if not (highest := loads(results)[-1:]):
        return []
    found = results["ratios_to_sarathi"][f"{highest[0]:g}"]
    names = [name for name in found["to_best"] if name not in found["to"]]
    rows = []
    for key, most in PAPER.items():
        for stat in ("mean", "p50", "p99") if key in TIMES else ("",):
            cells = [found["to_best"][name][key] for name in names]
            cells = [cell[stat] if stat else cell for cell in cells]
            label = f"{TITLES[key]}, {stat}" if stat else TITLES[key]
            rows.append([label, f"{most:g}x", *map(_ratio, cells)])
    sheet = Sheet(
        title=f"As the paper has it, at the highest load (arrival times x {highest[0]:g})",
        note=f"The paper: SPS2 to Sarathi-Serve, at most. Here: to {found['best']} on the same ranks",
        columns=["", "paper, at most", *names],
        rows=rows,
    )
    return [sheet] if names else []


def _ratio(cell: Mapping[str, float | None]) -> str:
    if cell["ratio"] is None:
        return NONE
    spread = "" if cell["min"] is None else f" ({cell['min']:.2f}-{cell['max']:.2f})"
    return f"{cell['ratio']:.2f}x{spread}"


def _seconds(milliseconds: float | None) -> str:
    return NONE if milliseconds is None else f"{milliseconds / 1e3:.3g}"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:,.3g}" if value < 1000 else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return NONE if value is None else f"{value:.1%}"
