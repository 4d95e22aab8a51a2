"""Figures of benchmarks.simulated_clusters: ratios to sarathi, and the map of who wins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

COLOURS = {"chunked": "#d9a441", "SP": "#4c78a8", "TP+SP": "#72b7b2", "CSA": "#e45756", None: "#dddddd"}
SHOWN = {
    "ttft_ms_mean": "TTFT",
    "tbt_ms_mean": "TBT",
    "e2e_ms_mean": "response time",
    "decode": "decode tokens/s",
}


_WHICH = ("all", "exact attention only")


def draw_ratios(compared: Sequence[dict[str, Any]], paper: Mapping[str, float], path: Path) -> None:
    """At the highest load; the line is the paper's "up to"."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator

    figure = Figure(figsize=(11, 0.32 * len(compared) + 1.8), layout="constrained")
    axes = figure.subplots(1, len(SHOWN), sharey=True)
    names = [each["scenario"] for each in compared]
    for panel, (key, label) in zip(axes, SHOWN.items(), strict=True):
        for offset, setting in ((-0.2, "sps2-exact"), (0.2, "sps2-csa")):
            values = [each["rows"][-1]["ratios_to_sarathi"][setting][key] for each in compared]
            places = [i + offset for i in range(len(names))]
            colour = COLOURS["CSA" if setting.endswith("csa") else "SP"]
            panel.barh(places, values, height=0.38, label=setting, color=colour)
        panel.axvline(1, color="black", linewidth=0.8)
        panel.axvline(paper[key.removesuffix("_mean")], color="black", linestyle=":", linewidth=0.8)
        panel.set(xscale="log", title=label)
        panel.xaxis.set_major_locator(FixedLocator([0.25, 0.5, 1, 2, 5, 10, 50]))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_locator(NullLocator())
        panel.tick_params(labelsize=7)
    axes[0].set_yticks(range(len(names)), names, fontsize=6)
    axes[0].invert_yaxis()
    axes[0].legend(fontsize=6)
    figure.suptitle(
        "Times better than sarathi on the same ranks, highest load; dotted: the paper's 'up to'. "
        "SIMULATED from data sheets",
        fontsize=8,
    )
    figure.savefig(path, dpi=110)


def draw_map(cells: Sequence[dict[str, Any]], path: Path) -> None:
    """Who has the shortest mean response time, by GPUs and longest prompt, with and without CSA."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(cell["model"] for cell in cells))
    figure = Figure(figsize=(4 * len(models), 6.4), layout="constrained")
    grid = figure.subplots(2, len(models), squeeze=False)
    for column, model in enumerate(models):
        mine = [cell for cell in cells if cell["model"] == model]
        for row, key in enumerate(("winner", "winner_exact")):
            _panel(grid[row][column], mine, key)
            grid[row][column].set_title(f"{model} on {mine[0]['profile']}, {_WHICH[row]}", fontsize=8)
    figure.suptitle(
        "Shortest mean response time: tp x sp of the winner, and times better than chunked "
        "prefill. SIMULATED from data sheets",
        fontsize=8,
    )
    figure.savefig(path, dpi=110)


def _panel(panel: Any, cells: Sequence[dict[str, Any]], key: str) -> None:
    gpus = sorted({cell["num_gpus"] for cell in cells})
    lengths = sorted({cell["longest"] for cell in cells})
    for cell in cells:
        x, y = gpus.index(cell["num_gpus"]), lengths.index(cell["longest"])
        winner = cell[key]
        panel.add_patch(_box(x, y, COLOURS[winner]))
        panel.text(x, y, _words(cell, winner), ha="center", va="center", fontsize=6)
    panel.set_xticks(range(len(gpus)), gpus, fontsize=7)
    panel.set_yticks(range(len(lengths)), [f"{each // 1024}K" for each in lengths], fontsize=7)
    panel.set(xlim=(-0.5, len(gpus) - 0.5), ylim=(-0.5, len(lengths) - 0.5))
    panel.set_xlabel("GPUs", fontsize=7)


def _box(x: int, y: int, colour: str) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x - 0.48, y - 0.48), 0.96, 0.96, color=colour)


def _words(cell: dict[str, Any], winner: str | None) -> str:
    if winner is None:
        return "does\nnot fit"
    best, chunked = cell["kinds"][winner], cell["kinds"]["chunked"]
    better = f"\n{chunked['e2e_s'] / best['e2e_s']:.1f}x" if chunked and winner != "chunked" else ""
    return f"{winner}\n{best['tp']} x {best['sp']}{better}"
