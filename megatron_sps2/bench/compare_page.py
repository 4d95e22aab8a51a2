"""A comparison as one HTML page: its tables, distributions of every load, latency over load.

Knows report.py's page and figures.py's plots, not how anything was measured.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_sps2.bench.compare_tables import Results, loads, sheets
from megatron_sps2.bench.comparison import Comparison
from megatron_sps2.bench.report import page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SAID = (
    *("model_id", "dtype", "kv_cache_dtype", "trace", "prompts", "rounds", "seed"),
    *("hardware", "commit", "command"),
)
NOTES = (
    "TTFT: from sending a request to its first token. TBT: each gap between two tokens of an answer. TPOT: "
    "an answer's mean time per token after the first. Response time (E2E): from sending to the last token. "
    "Only requests that were answered whole count in them. All settings replayed the same requests at the "
    "same times, in turns whose order rotates, with nothing beside them. Prefixes repeat within a round as "
    "the trace has them; other rounds and loads have other tokens, so that no prefix cache knows a prompt "
    "from an earlier turn. Prompts of CSA use no prefix cache."
)


def comparison_page(comparison: Comparison, results: Results) -> str:
    found = sheets(results)
    return page(
        "Settings compared",
        "; ".join(f"{name} {results[name]}" for name in SAID if results.get(name) is not None),
        [sheet.lines for sheet in found],
        figures(comparison, results),
        NOTES,
        [f"{sheet.title}. {sheet.note}" for sheet in found],
    )


def figures(comparison: Comparison, results: Results) -> list[Figure]:
    """Distributions, for each load one row of axes with every setting on them; then latency over load."""
    from megatron_sps2.bench.figures import distributions, load_curves

    names = [each.name for each in comparison.settings]
    drawn: list[Figure] = []
    for load in loads(results):
        figure = distributions({name: comparison.records(load, name) for name in names})
        figure.suptitle(f"arrival times x {load:g}")
        drawn.append(figure)
    curves = {name: [one for one in results["results"] if one["setting"] == name] for name in names}
    return [*drawn, load_curves(curves)] if len(drawn) > 1 else drawn
