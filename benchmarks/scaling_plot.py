"""The plots of benchmarks.scaling: measured points on the lines of theory. Knows its JSON, runs nothing."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.work_model import Row, WorkModel, fit
from megatron_sps2.config import ModelConfig, ParallelConfig
from megatron_sps2.parallel.traffic import Traffic

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")
# Of points, and of the line of theory through them.
STYLES = {"exact": ("o", "-"), "csa": ("s", "--")}
ELEMENT_SIZE = 2

Line = Callable[[Row], float]


def draw(found: dict[str, Any], folder: Path) -> None:
    """Three files in `folder` from what benchmarks.scaling wrote."""
    rows = [Row(**row) for row in found["rows"]]
    work = fit(rows, found["cores"])
    folder.mkdir(parents=True, exist_ok=True)
    attention(rows, work).savefig(folder / "scaling_attention.png", dpi=80)
    traffic(rows, ModelConfig(**found["model"])).savefig(folder / "scaling_bytes.png", dpi=80)
    ttft(rows, work).savefig(folder / "scaling_ttft.png", dpi=80)


def attention(rows: Sequence[Row], work: WorkModel) -> Figure:
    """Seconds of a rank in attention against length."""
    figure, (axes,) = _figure(
        "Seconds in attention, mean over ranks. Lines: exact c S²/P, CSA (l S + c k S²)/P; k: share of pairs "
        f"kept, measured; c = {work.pair_s:.2e} s and l = {work.csa_linear_s:.2e} s from one point each. "
        f"{_who(rows, work)}",
        1,
    )

    def seconds(row: Row) -> float:
        # A rank that waits for its turn on a core spends no CPU time, so this is what it would take alone.
        return row.attention_cpu_s if row.sp > work.cores else row.attention_s

    def theory(row: Row) -> float:
        return work.attention(row.tokens, row.sp, kept=row.kept, csa=row.mode == "csa")

    shared = {sp for sp in _ranks(rows) if sp > work.cores}
    _against_length(axes, rows, seconds, theory, lambda sp: " (CPU seconds)" if sp in shared else "")
    axes.set_ylabel("seconds in attention")
    return figure


def traffic(rows: Sequence[Row], model: ModelConfig) -> Figure:
    """Bytes sent per rank and layer, against length and against sp."""
    figure, (left, right) = _figure(
        "Bytes that attention sends per rank and layer, by the ledger. Lines: the formulas; CSA's takes the "
        "number of keys sent as measured. One rank sends nothing.",
        2,
    )

    def exact_bytes(name: str, tokens: int, sp: int) -> float:
        parallel = ParallelConfig(sp_size=sp)
        of_ranks = Traffic(model=model, parallel=parallel, element_size=ELEMENT_SIZE)
        return float(getattr(of_ranks, name)(tokens))

    def theory(row: Row) -> float:
        return exact_bytes(row.strategy, row.tokens, row.sp) if row.mode == "exact" else row.bytes_formula

    spread = [row for row in rows if row.sp > 1] or list(rows)
    _against_length(left, spread, lambda row: row.bytes_sent, theory, lambda _: "")
    left.set_ylabel("bytes per rank and layer")
    length, sizes = _common_length(spread), range(1, max(_ranks(rows)) + 1)
    for name, style in (("ulysses", "-"), ("pass_kv", ":")):
        megabytes = [exact_bytes(name, length, sp) / 1e6 for sp in sizes]
        right.plot(sizes, megabytes, style, color="grey", label=f"{name}, formula")
    _against_sp(right, rows, length, lambda row: row.bytes_sent / 1e6, None)
    right.set_ylabel("MB per rank and layer")
    return figure


def ttft(rows: Sequence[Row], work: WorkModel) -> Figure:
    """Time to first token against length and against sp."""
    figure, (left, right) = _figure(
        "Time to first token. Lines: (a S + attention's work)/P, P at most the cores; "
        f"a = {work.linear_s:.2e} s from one point. {_who(rows, work)}",
        2,
    )

    def theory(row: Row) -> float:
        return work.ttft(row.tokens, row.sp, kept=row.kept, csa=row.mode == "csa")

    _against_length(left, rows, lambda row: row.ttft_s, theory, lambda sp: _note(sp, work.cores))
    left.set_ylabel("TTFT, seconds")
    _against_sp(right, rows, _common_length(rows), lambda row: row.ttft_s, theory)
    right.set_ylim(bottom=0)
    right.set_ylabel("TTFT, seconds")
    return figure


def _figure(caption: str, num_panels: int) -> tuple[Figure, Sequence[Axes]]:
    """The caption stands below the panels."""
    figure = Figure(figsize=(5.6 * num_panels + 2.4 * (num_panels == 1), 5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, num_panels, squeeze=False)[0]
    figure.supxlabel(textwrap.fill(caption, 110 if num_panels == 1 else 160), fontsize=8)
    return figure, list(panels)


def _against_length(
    axes: Axes, rows: Sequence[Row], measured: Line, theory: Line, note: Callable[[int], str]
) -> None:
    """Log-log; a series for each mode and sp. Exact attention's lines go on to lengths that were left out."""
    lengths = sorted({row.tokens for row in rows})
    for sp, colour in zip(_ranks(rows), COLOURS, strict=False):
        for mode, (marker, style) in STYLES.items():
            series = sorted((r for r in rows if (r.mode, r.sp) == (mode, sp)), key=lambda row: row.tokens)
            if not series:
                continue
            tokens = [row.tokens for row in series]
            # What CSA keeps is known only where it ran.
            lined = [replace(series[0], tokens=each) for each in lengths] if mode == "exact" else series
            line = [row.tokens for row in lined], [theory(row) for row in lined]
            axes.plot(*line, style, color=colour, linewidth=1)
            label = f"{mode}, sp {sp}{note(sp)}"
            axes.plot(
                tokens,
                [measured(row) for row in series],
                marker,
                color=colour,
                label=label,
                fillstyle=_fill(mode),
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("prompt tokens")
    axes.grid(alpha=0.3)
    if rows:
        axes.legend(fontsize=7)


def _against_sp(axes: Axes, rows: Sequence[Row], length: int, measured: Line, theory: Line | None) -> None:
    """One length; a series for each mode."""
    for (mode, (marker, style)), colour in zip(STYLES.items(), ("black", "tab:red"), strict=True):
        series = sorted((r for r in rows if (r.mode, r.tokens) == (mode, length)), key=lambda row: row.sp)
        if not series:
            continue
        sizes = [row.sp for row in series]
        if theory is not None:
            axes.plot(sizes, [theory(row) for row in series], style, color=colour, linewidth=1)
        strategy = series[-1].strategy
        label = mode if mode == strategy else f"{mode} ({strategy})"
        axes.plot(
            sizes, [measured(row) for row in series], marker, color=colour, label=label, fillstyle=_fill(mode)
        )
    axes.set_xticks(_ranks(rows))
    axes.set_xlabel(f"sp, at {length:,} tokens")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)


def _ranks(rows: Sequence[Row]) -> list[int]:
    return sorted({row.sp for row in rows})


def _common_length(rows: Sequence[Row]) -> int:
    """The longest prompt that every sp and mode has; else the longest."""
    kinds = {(row.mode, row.sp) for row in rows}
    by_kind = [{r.tokens for r in rows if (r.mode, r.sp) == kind} for kind in kinds]
    return max(set.intersection(*by_kind) or set.union(*by_kind))


def _fill(mode: str) -> Any:
    return "full" if mode == "exact" else "none"


def _note(sp: int, cores: int) -> str:
    return f" ({sp} ranks on {cores} cores)" if sp > cores else ""


def _who(rows: Sequence[Row], work: WorkModel) -> str:
    """Which ranks had which cores: what a reader must know before reading a speed-up."""
    said = ["Each rank has one thread"]
    if 1 in _ranks(rows) and work.cores > 1:
        said.append("sp 1 uses one core")
    said += [
        f"sp {sp} is {sp} ranks on {work.cores} cores: no speed-up" for sp in _ranks(rows) if sp > work.cores
    ]
    return "; ".join(said) + "."
