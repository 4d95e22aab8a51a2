"""The tables of docs/evaluation.md from what was measured: python -m benchmarks.evaluation.

Reads benchmarks/evaluation/*.json, rewrites what stands between <!-- NAME --> and <!-- end --> on the page.
Measures nothing; a file that is not there leaves its table as it was.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.table import Cell, ratios, ratios_table, times_table

FOLDER = Path(__file__).parent / "evaluation"
PAGE = Path(__file__).parent.parent / "docs" / "evaluation.md"
LATENCIES = {"TTFT": "ttft", "TBT": "tbt", "response time": "e2e"}
STATISTICS = ("mean", "p50", "p99")
THROUGHPUTS = {
    "prefill throughput": "prefill_throughput",
    "decode throughput": "decode_throughput",
    "prefill throughput, busy": "prefill_throughput_busy",
    "decode throughput, busy": "decode_throughput_busy",
}


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def compared(found: dict[str, Any]) -> str:
    """Of `sps2 bench compare`: what was measured, ratios at each load, agreement."""
    parts = [_facts(found), _measured(found)]
    parts += [_ratios(found, str(load)) for load in found["ratios_to_sarathi"]]
    return "\n\n".join([*parts, _agreement(found)])


def _facts(found: dict[str, Any]) -> str:
    commit, _, changes = (found["commit"] or "unknown").partition(" ")
    about = f"Commit {commit[:7]} {changes}".strip()
    return f"{about}, {found['hardware']}, torch {found['versions']['torch']}:\n\n    {found['command']}"


def _measured(found: dict[str, Any]) -> str:
    header = ["arrival times x", "setting", "answered"]
    header += [f"{name} {statistic}, s" for name in ("TTFT", "response") for statistic in STATISTICS]
    header += [f"TBT {statistic}, ms" for statistic in STATISTICS]
    header += ["prefill tok/s, busy", "decode tok/s, busy"]
    rows = []
    for each in found["results"]:
        row = [
            f"{each['load']:g}",
            each["setting"],
            f"{each['completed']} of {each['completed'] + each['failed']}",
        ]
        row += [_seconds(each[f"{s}_{n}_ms"]) for n in ("ttft", "e2el") for s in STATISTICS]
        row += ["-" if each[f"{s}_itl_ms"] is None else f"{each[f'{s}_itl_ms']:.0f}" for s in STATISTICS]
        row += [f"{each[f'{n}_throughput_busy']:.3g}" for n in ("prefill", "decode")]
        rows.append(row)
    return table(header, rows)


def _seconds(milliseconds: float | None) -> str:
    return "-" if milliseconds is None else f"{milliseconds / 1e3:.3g}"


def _ratios(found: dict[str, Any], load: str) -> str:
    """Times better than the best sarathi at one load, with the least and most of single rounds."""
    at = found["ratios_to_sarathi"][load]
    settings = list(at["to_best"])
    rows = []
    for label, name in LATENCIES.items():
        paper = f"{found['paper'][name]:g}x"
        for statistic in STATISTICS:
            shown = [_times(at["to_best"][setting][name][statistic]) for setting in settings]
            rows.append([f"{label}, {statistic}", paper, *shown])
    for label, name in THROUGHPUTS.items():
        paper = f"{found['paper'][name.removesuffix('_busy')]:g}x"
        rows.append([label, paper, *(_times(at["to_best"][setting][name]) for setting in settings)])
    title = (
        f"Arrival times x {load}, times better than {at['best']} (of sarathi's the best mean response time):"
    )
    return f"{title}\n\n{table(['', 'paper, at most', *settings], rows)}"


def _times(ratio: dict[str, float | None]) -> str:
    if ratio["ratio"] is None:
        return "-"
    return f"{ratio['ratio']:.2f}x ({ratio['min']:.2f} to {ratio['max']:.2f})"


def _agreement(found: dict[str, Any]) -> str:
    header = ["arrival times x", "setting", "equal first token", "equal tokens until the first difference"]
    rows = [
        [
            f"{each['load']:g}",
            each["setting"],
            f"{each['agreement']['first_token']:.1%}",
            f"{each['agreement']['tokens_until_difference']:.1%}",
            f"{each['agreement']['whole']:.1%}",
            f"{each['mean_kept_mass']:.1%}" if each.get("mean_kept_mass") else "-",
        ]
        for each in found["results"]
        if each.get("agreement")
    ]
    return table([*header, "equal answers", "attention kept"], rows)


def peers(found: dict[str, Any]) -> str:
    """Of benchmarks.peers.run: times and ratios of both phases."""
    parts = []
    for phase in ("model", "attention"):
        if phase in found:
            cells = {
                workload: {
                    name: Cell(each["seconds"], each["tokens"], each["others"], each["absent"])
                    for name, each in by_peer.items()
                }
                for workload, by_peer in found[phase]["results"].items()
            }
            ours = {each["ours"] for each in found[phase]["ratios"]}
            parts += [times_table(cells, _decoded(found["flags"])), ratios_table(ratios(cells, sorted(ours)))]
    return "\n\n".join(parts)


def _decoded(flags: dict[str, Any]) -> dict[str, int]:
    """Tokens of the workload that is told as a rate too, by its name."""
    return {
        f"{flags['decodes']} decodes at {flags['decode_context']}": flags["decodes"] * flags["decode_tokens"]
    }


def simulator_error(found: list[dict[str, Any]]) -> str:
    rows = [
        [
            row["sp"],
            row["policy"],
            row["trace"],
            row["metric"],
            f"{row['real']:.1f}",
            f"{row['simulated']:.1f}",
            f"{row['error']:+.1%}",
            f"{row['rounds apart']:.1%}",
        ]
        for case in found
        for row in case["rows"]
    ]
    header = ["sp", "policy", "trace", "", "real", "simulated", "error", "rounds apart"]
    within = sum(abs(row["error"]) <= 0.2 for case in found for row in case["rows"])
    return f"{table(header, rows)}\n\n{within} of {len(rows)} are within 20%."


WRITERS: dict[str, Callable[[Any], str]] = {
    "mooncake": compared,
    "long_prompts": compared,
    "peers": peers,
    "peers_32k": peers,
    "simulator_error": simulator_error,
}


def fill(page: str, tables: dict[str, str]) -> str:
    """The page with these tables in their places. Raises ValueError for a table that has no place."""
    for name, text in tables.items():
        place = re.search(rf"(?<=<!-- {name} -->\n).*?(?=<!-- end -->)", page, re.DOTALL)
        if not place:
            raise ValueError(
                f"the page has no <!-- {name} --> ... <!-- end -->; add it where the table belongs"
            )
        page = f"{page[: place.start()]}{text}\n{page[place.end() :]}"
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--folder", type=Path, default=FOLDER)
    args = parser.parse_args()
    files = {name: args.folder / f"{name}.json" for name in WRITERS}
    tables = {
        name: WRITERS[name](json.loads(file.read_text("utf-8")))
        for name, file in files.items()
        if file.exists()
    }
    args.page.write_text(fill(args.page.read_text("utf-8"), tables), "utf-8")
    print(f"{args.page}: {', '.join(tables) or 'nothing measured yet'}")


if __name__ == "__main__":
    main()
