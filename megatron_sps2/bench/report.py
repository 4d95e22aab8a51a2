"""Numbers to a table on the terminal, to one JSON document and to one HTML page that needs no other file."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.box import SIMPLE_HEAD
from rich.table import Table

from megatron_sps2.bench.record import Record
from megatron_sps2.bench.summary import METRICS, per_request

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {"ttft": "TTFT, ms", "itl": "TBT, ms", "tpot": "TPOT, ms", "e2el": "E2E, ms"}
STATISTICS = ("mean", "std", "p50", "p90", "p99", "max")
Rows = Sequence[Sequence[str]]  # the header first
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; color: #222; }}
svg {{ max-width: 100%; height: auto; }} table {{ border-collapse: collapse; margin: 1rem 0; }}
th, td {{ padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
</style></head><body>
<h1>{title}</h1>
<p>{facts}</p>
{body}
<p>{notes}</p>
</body></html>
"""
NOTES = (
    "TTFT: from sending a request to its first token. TBT: each gap between two tokens of an answer. "
    "TPOT: an answer's mean time per token after the first. E2E: from sending to the last token. Only "
    "requests that were answered whole count in them. Throughputs are over the whole run, its end with few "
    "requests included."
)


def latency_rows(summary: Mapping[str, Any]) -> Rows:
    """One line for each latency, under its statistics."""
    lines = [
        [NAMES[metric], *(_number(summary[f"{statistic}_{metric}_ms"]) for statistic in STATISTICS)]
        for metric in sorted(METRICS, key=list(NAMES).index)
    ]
    return [["", *STATISTICS], *lines]


def throughput_rows(summary: Mapping[str, Any]) -> Rows:
    """Counts and throughputs, one a line."""
    wanted = {
        "requests answered": summary["completed"],
        "requests failed": summary["failed"],
        "duration, s": summary["duration"],
        "requests/s": summary["request_throughput"],
        "requests/s within the goodput limits": summary["request_goodput"],
        "prefill tokens/s": summary["input_throughput"],
        "decode tokens/s": summary["output_throughput"],
        "prompt tokens": summary["total_input_tokens"],
        "of them cached": summary["total_cached_tokens"],
        "output tokens": summary["total_output_tokens"],
        "most requests at once": summary["max_concurrent_requests"],
        "sent late by at most, ms": summary["max_send_delay_ms"],
    }
    return [["", "value"], *([name, _number(value)] for name, value in wanted.items() if value is not None)]


def error_rows(summary: Mapping[str, Any]) -> Rows:
    return [["error", "times"], *([error, str(n)] for error, n in summary["error_counts"].items())]


def table(rows: Rows, title: str = "") -> Table:
    """For a terminal."""
    found = Table(title=title or None, box=SIMPLE_HEAD, pad_edge=False)
    for place, name in enumerate(rows[0]):
        found.add_column(name, justify="right" if place else "left", overflow="fold")
    for row in rows[1:]:
        found.add_row(*row)
    return found


def page(
    title: str, facts: str, tables: Sequence[Rows], figures: Sequence[Figure], notes: str = NOTES
) -> str:
    """HTML, with everything in it."""
    from megatron_sps2.bench.figures import svg

    body = [*map(_html_table, tables), *(f"<figure>{svg(figure)}</figure>" for figure in figures)]
    return _PAGE.format(
        title=html.escape(title), facts=html.escape(facts), body="\n".join(body), notes=html.escape(notes)
    )


def document(
    facts: Mapping[str, Any], summary: Mapping[str, Any], records: Sequence[Record]
) -> dict[str, Any]:
    """What `vllm bench serve --save-detailed` would write: what was run, then what came of it."""
    return {"date": date(), **facts, **summary, **per_request(records)}


def date() -> str:
    """Now, as vLLM writes it."""
    return datetime.now().strftime("%Y%m%d-%H%M%S")


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    Path(path).write_bytes(msgspec.json.format(msgspec.json.encode(content), indent=1) + b"\n")


def _html_table(rows: Rows) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return (
        "<table>\n" + "\n".join([line(rows[0], "th"), *(line(row, "td") for row in rows[1:])]) + "\n</table>"
    )


def _number(value: float | int | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}" if value < 1000 else f"{value:,.0f}"
