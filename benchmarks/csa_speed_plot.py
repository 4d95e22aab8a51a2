"""A prefill's time, exact beside CSA, as stacked bars: `python -m benchmarks.csa_speed_plot PNG JSON`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

COLOURS = {
    "selection": "tab:orange",
    "exchange": "tab:red",
    "local": "tab:blue",
    "far": "tab:cyan",
    "tail": "tab:purple",
    "layers": "lightgrey",
}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for each row of csa_speed's JSON; `layers` is all that is not attention."""
    figure = Figure(figsize=(3.2 * len(rows), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        axes.bar(["exact"], [row["exact_s"]], color="grey")
        bottom = 0.0
        rest = {"layers": row["csa_s"] - sum(row["seconds"].values())}
        for name, seconds in {**row["seconds"], **rest}.items():
            axes.bar(["CSA"], [seconds], bottom=bottom, color=COLOURS[name], label=name)
            bottom += seconds
        axes.set_title(f"{row['tokens']:,} tokens, {row['exact_s'] / row['csa_s']:.1f}x", fontsize=10)
        axes.set_ylabel("seconds")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=80)


def main() -> None:
    png, *sources = map(Path, sys.argv[1:])
    draw([row for source in sources for row in json.loads(source.read_text())], png)


if __name__ == "__main__":
    main()
