"""Rows of benchmarks.accuracy as a table and as a plot of accuracy beside bytes.

python -m benchmarks.accuracy_plot PNG JSON [JSON ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # only a plot needs it
    from matplotlib.axes import Axes

Row = dict[str, Any]
MARKERS = "osD^vP"
PLACES = ("bytes_ratio_to_pass_kv", "perplexity_rise", "perplexity_rise_error")
GOAL_PERCENT = 1.0  # more perplexity than dense that is still called the same


def table(rows: list[Row]) -> str:
    """Markdown; in parentheses how much more perplexity than exact attention's, and its standard error."""
    kinds = list(rows[0]["texts"]) if rows else []
    columns = (
        *("tokens", "setting", "bytes / pass_kv", "kept mass", "density", "perplexity"),
        *(kinds if len(kinds) > 1 else ()),
        *("agreement", "KL, first", "KL", "needles", "RULER"),
    )
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        by_text = [_perplexity(row["texts"].get(kind)) for kind in kinds] if len(kinds) > 1 else []
        cells = [
            *(row["tokens"], row["setting"], f"{row['bytes_ratio_to_pass_kv']:.3f}"),
            *(_or_dash(row["kept_mass"]), f"{row['density']:.3f}", _perplexity(row)),
            *by_text,
            *(f"{row['agreement']:.3f}", f"{row['kl_first']:.2g}", f"{row['kl']:.2g}"),
            f"{row['needles_found']}/{row['needles']}" if row["needles"] else "-",
            ", ".join(f"{kind} {share:.2f}" for kind, share in row.get("ruler", {}).items()) or "-",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def draw(rows: list[Row], path: Path) -> None:
    """A panel for each length, and one for needles where there are any. Needs matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise RuntimeError("a plot needs matplotlib; install it with `pip install matplotlib`") from None
    matplotlib.use("agg")
    from matplotlib import pyplot

    lengths = list(dict.fromkeys(row["tokens"] for row in rows))
    sought = [row for row in rows if row["needles"]]
    panels = len(lengths) + bool(sought)
    figure, grid = pyplot.subplots(
        1, panels, figsize=(4.6 * panels, 4.2), squeeze=False, layout="constrained"
    )
    names = list(dict.fromkeys(row["setting"] for row in rows))
    colours = {name: f"C{i % 10}" for i, name in enumerate(names)}
    for axes, length in zip(grid[0], lengths, strict=False):
        _draw_perplexity(axes, [row for row in rows if row["tokens"] == length], colours)
    if sought:
        _draw_needles(grid[0][-1], sought, colours)
    for axes in grid[0]:
        axes.set_xlabel("bytes sent / pass_kv's")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    handles = [
        pyplot.Line2D([], [], color=colour, marker="o", ls="", label=name) for name, colour in colours.items()
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 5), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    pyplot.close(figure)


def _draw_perplexity(axes: Axes, rows: list[Row], colours: dict[str, str]) -> None:
    """A point for each setting and text; the scale is logarithmic beyond 1%."""
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["texts"]))
    for kind, marker in zip(kinds, MARKERS * len(kinds), strict=False):
        axes.scatter([], [], c="grey", marker=marker, label=kind)
        for row in (row for row in rows if kind in row["texts"]):
            own, colour = row["texts"][kind], colours[row["setting"]]
            x, y, error = (100 * own[name] for name in PLACES)
            axes.errorbar(x / 100, y, error, c=colour, marker=marker, ms=5, lw=0.7)
    axes.axhline(GOAL_PERCENT, color="grey", ls="--", lw=0.8)
    axes.set_yscale("symlog", linthresh=1)
    axes.margins(y=0.08)
    axes.set_yticks(*_ticks(axes.get_ylim()))
    axes.set_ylabel("perplexity of the continuation, % above dense")
    axes.set_title(f"{rows[0]['tokens']} tokens, {rows[0]['sp']} ranks")
    axes.legend(fontsize="small")


def _ticks(limits: tuple[float, float]) -> tuple[list[float], list[str]]:
    """Plain percentages inside the limits, and their labels."""
    places = [p for p in (-10, -3, -1, -0.5, 0, 0.5, 1, 3, 10, 30, 100) if limits[0] <= p <= limits[1]]
    return places, [f"{place:g}" for place in places]


def _draw_needles(axes: Axes, rows: list[Row], colours: dict[str, str]) -> None:
    lengths = list(dict.fromkeys(row["tokens"] for row in rows))
    for row in rows:
        share = 100 * row["needles_found"] / row["needles"]
        marker = MARKERS[lengths.index(row["tokens"]) % len(MARKERS)]
        axes.scatter(row["bytes_ratio_to_pass_kv"], share, c=colours[row["setting"]], marker=marker)
    for length, marker in zip(lengths, MARKERS * len(lengths), strict=False):
        axes.scatter([], [], c="grey", marker=marker, label=f"{length} tokens")
    axes.legend(fontsize="small")
    axes.set_ylim(-3, 103)
    axes.set_ylabel("pass keys found, %")
    axes.set_title(f"retrieval, {rows[0]['needles']} needles")


def _perplexity(found: Row | None) -> str:
    if not found:
        return "-"
    rise, error = (100 * found[name] for name in ("perplexity_rise", "perplexity_rise_error"))
    return f"{found['perplexity']:.3f} ({rise:+.2f} ± {error:.2f}%)"


def _or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(f"usage: python -m benchmarks.accuracy_plot PNG JSON [JSON ...]; got {sys.argv[1:]}")
    rows = [row for file in sys.argv[2:] for row in json.loads(Path(file).read_text(encoding="utf-8"))]
    draw(rows, Path(sys.argv[1]))
    print(table(rows))


if __name__ == "__main__":
    main()
