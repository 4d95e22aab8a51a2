"""Draws what `sps2 csa report` measured: PNG files, and one HTML page that holds them all.

Knows matplotlib, which is imported with this module alone; measures nothing.
"""

from __future__ import annotations

import base64
import html
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullLocator

from megatron_sps2.engine.trade_off import Measured, TradeOff

PAGE_NAME = "csa_report.html"
COLUMNS = ("setting", "perplexity", "to exact", "mass kept", "far keys", "bytes", "speed")
DPI = 120
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; color: #222; }}
img {{ max-width: 100%; }} table {{ border-collapse: collapse; }}
th, td {{ padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
</style></head><body>
<h1>{title}</h1>
<p>{facts}</p>
{table}
<p>{notes}</p>
{images}
</body></html>
"""
_NOTES = (
    "Perplexity is that of the continuation, which attends to everything after a prompt that ran by the "
    "setting. Mass kept is the share of the probe queries' attention; far keys those of earlier segments. "
    "Bytes are those of all ranks, beside exact attention by pass_kv. Speed is that of one rank's prefill, "
    "beside exact attention in the same run."
)

Matrix = tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What was run."""

    checkpoint: str
    text: str
    num_tokens: int
    num_continuation: int
    num_ranks: int


def write_report(folder: Path, found: TradeOff, facts: Facts) -> Path:
    """Writes the images and the page, which it returns; the heat maps are of the first setting."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = found.settings[0]
    assert drawn.report is not None, "the first setting has budgets"
    figures = {
        "density.png": _heat_map(
            drawn.report.density_table, f"far keys kept, setting {drawn.name}", "viridis"
        ),
        "kept_mass.png": _heat_map(drawn.report.mass_table, f"attention kept, setting {drawn.name}", "magma"),
        "trade_off.png": _trade_off(found, facts),
    }
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=DPI)
    page = folder / PAGE_NAME
    page.write_text(_page(folder, list(figures), found, facts), encoding="utf-8")
    return page


def rows(found: TradeOff) -> list[tuple[str, ...]]:
    """The table under COLUMNS, exact attention first."""
    exact = ("exact", f"{found.exact_perplexity:.3f}", "", "100%", "100%", "1", "1")
    return [exact, *map(_row, found.settings)]


def _row(one: Measured) -> tuple[str, ...]:
    return (
        one.name,
        f"{one.perplexity:.3f}",
        f"{one.perplexity_ratio - 1:+.2%}",
        "-" if one.kept_mass is None else f"{one.kept_mass:.2%}",
        f"{one.density:.2%}",
        f"{one.bytes_ratio:.3f}",
        f"{one.speed_ratio:.2f}x",
    )


def _figure(width: float, height: float) -> Figure:
    """Without pyplot, which would keep every figure and look for a display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _heat_map(table: Matrix, title: str, colours: str) -> Figure:
    """Layers along x, KV heads along y; what was not measured stays blank."""
    values = np.array([[np.nan if value is None else value for value in row] for row in table]).T
    figure = _figure(max(6, 2 + 0.3 * values.shape[1]), max(2.5, 1.5 + 0.3 * values.shape[0]))
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap=colours, aspect="auto", interpolation="nearest")
    axes.set(title=title, xlabel="layer", ylabel="KV head")
    axes.set_yticks(range(values.shape[0]))
    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
    figure.colorbar(image, ax=axes, format=FuncFormatter(lambda value, _: f"{value:.1%}"))
    return figure


def _trade_off(found: TradeOff, facts: Facts) -> Figure:
    figure = _figure(15, 5)
    left, middle, right = figure.subplots(1, 3, sharey=True)
    settings = found.settings
    _scatter(left, found, [one.density for one in settings], "far keys kept")
    _scatter(
        middle, found, [one.bytes_ratio for one in settings], f"bytes of {facts.num_ranks} ranks / pass_kv"
    )
    _scatter(right, found, [one.speed_ratio for one in settings], "prefill speed / exact, one rank")
    left.set_ylabel("perplexity of the continuation, against exact")
    return figure


def _scatter(axes: Axes, found: TradeOff, x: list[float], label: str) -> None:
    # Linear around exact, logarithmic where a setting is far off.
    axes.set_yscale("symlog", linthresh=0.01)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+.1%}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.axhline(0, color="grey", linewidth=1)
    axes.grid(alpha=0.3)
    axes.set_xlabel(label)
    axes.margins(x=0.2, y=0.15)
    for i, (at, one) in enumerate(zip(x, found.settings, strict=True)):
        y = one.perplexity_ratio - 1
        axes.scatter([at], [y], color=f"C{i}", s=45, zorder=3)
        axes.annotate(one.name, (at, y), xytext=(6, 5), textcoords="offset points", fontsize=9)


def _page(folder: Path, images: list[str], found: TradeOff, facts: Facts) -> str:
    title = f"CSA on {facts.checkpoint}"
    said = (
        f"A prompt of {facts.num_tokens:,} tokens of {facts.text} and a continuation of "
        f"{facts.num_continuation}; bytes counted for {facts.num_ranks} sequence-parallel ranks."
    )
    return _PAGE.format(
        title=html.escape(title),
        facts=html.escape(said),
        table=_table(found),
        notes=html.escape(_NOTES),
        images="\n".join(_embedded(folder / name) for name in images),
    )


def _table(found: TradeOff) -> str:
    def line(cells: tuple[str, ...], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    body = "\n".join(line(row, "td") for row in rows(found))
    return f"<table>\n{line(COLUMNS, 'th')}\n{body}\n</table>"


def _embedded(path: Path) -> str:
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{path.stem}" src="data:image/png;base64,{content}"></p>'
