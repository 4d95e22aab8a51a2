"""Draws records: distributions, who ran when, throughput over time, latency over load.

Knows matplotlib, which is imported with this module alone; several runs share one pair of axes by name.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from megatron_sps2.bench.record import Record
from megatron_sps2.bench.summary import metric_values

Runs = Mapping[str, Sequence[Record]]
Curves = Mapping[str, Sequence[Mapping[str, Any]]]  # of summaries, one for each load
TITLES = {"ttft": "TTFT", "itl": "TBT", "e2el": "E2E", "tpot": "TPOT"}
MAX_POINTS = 400  # of a distribution's line
NUM_BINS = 60  # of the run's time
_WAITING, _ANSWERING, _FAILED = "#c8ccd4", "#3b6fb6", "#c0392b"


def distributions(runs: Runs, metrics: Sequence[str] = ("ttft", "itl", "e2el")) -> Figure:
    """The share of requests (TBT: of gaps) that took at most so long, one line for each run."""
    figure = _figure(5 * len(metrics), 4)
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        for name, records in runs.items():
            _distribution(axes, metric_values(_done(records))[metric], name)
        axes.set(title=TITLES[metric], xlabel="seconds", ylabel="share", ylim=(0, 1.02))
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        _name_lines(axes, runs)
    return figure


def _distribution(axes: Axes, seconds: Sequence[float], name: str) -> None:
    if not seconds:
        return
    shares = np.linspace(0, 1, min(MAX_POINTS, len(seconds) + 1))
    axes.plot(np.quantile(seconds, shares, method="inverted_cdf"), shares, drawstyle="steps-post", label=name)


def timeline(records: Sequence[Record]) -> Figure:
    """One line a request: waiting for its first token, then answering; red where it failed."""
    figure = _figure(12, min(14.0, max(3.0, 1.5 + 0.08 * len(records))))
    axes = figure.subplots()
    parts: dict[str, list[tuple[int, float, float]]] = {_WAITING: [], _ANSWERING: [], _FAILED: []}
    for row, each in enumerate(records):
        first = each.chunk_times[0] if each.ok else each.end_s
        parts[_WAITING if each.ok else _FAILED].append((row, each.sent_s, first))
        if each.ok:
            parts[_ANSWERING].append((row, first, each.end_s))
    labels = ("waiting for the first token", "answering", "failed")
    for (colour, lines), label in zip(parts.items(), labels, strict=True):
        if lines:
            rows, starts, ends = zip(*lines, strict=True)
            axes.hlines(rows, starts, ends, colors=colour, linewidth=2.5, label=label)
    axes.set(title="Requests", xlabel="seconds after the start", ylabel="request")
    axes.invert_yaxis()
    if records:
        figure.legend(loc="outside lower center", ncols=len(labels))
    return figure


def throughput(runs: Runs) -> Figure:
    """Tokens per second over time: prompts as their first token comes, answers as they come."""
    figure = _figure(12, 4)
    left, right = figure.subplots(1, 2)
    for name, records in runs.items():
        done = _done(records)
        prompts = [(each.chunk_times[0], each.num_prompt_tokens) for each in done]
        answers = [(time, 1) for each in done for time in each.token_times]
        end = max((each.end_s for each in done), default=0.0)
        _rate(left, prompts, end, name)
        _rate(right, answers, end, name)
    for axes, what in ((left, "prefill"), (right, "decode")):
        axes.set(title=f"Throughput, {what}", xlabel="seconds after the start", ylabel="tokens/s")
        axes.grid(alpha=0.3)
        _name_lines(axes, runs)
    return figure


def _rate(axes: Axes, counts: Sequence[tuple[float, int]], end: float, name: str) -> None:
    if counts and end > 0:
        times, weights = zip(*counts, strict=True)
        sums, edges = np.histogram(times, bins=NUM_BINS, range=(0, end), weights=weights)
        axes.stairs(sums / np.diff(edges), edges, label=name)


def load_curves(
    curves: Curves,
    metrics: Sequence[str] = ("p50_ttft_ms", "p99_ttft_ms", "p99_tpot_ms"),
    limits: Mapping[str, float] | None = None,
) -> Figure:
    """Latency over throughput: one line for each name through its loads in order; limits where given."""
    figure = _figure(5 * len(metrics), 4)
    for axes, metric in zip(figure.subplots(1, len(metrics), squeeze=False)[0], metrics, strict=True):
        for name, summaries in curves.items():
            points = [(s["request_throughput"], s[metric]) for s in summaries if s[metric] is not None]
            axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
        if limits and metric in limits:
            axes.axhline(limits[metric], color=_FAILED, linestyle="--", label="limit")
        axes.set(title=metric, xlabel="requests/s answered", ylabel="ms")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        _name_lines(axes, curves)
    return figure


def svg(figure: Figure) -> str:
    """The figure as an element of an HTML page."""
    text = io.StringIO()
    with rc_context({"svg.fonttype": "none"}):  # letters, not their outlines
        figure.savefig(text, format="svg")
    return text.getvalue()[text.getvalue().index("<svg") :]


def _figure(width: float, height: float) -> Figure:
    """Without pyplot, which would keep every figure and look for a display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _name_lines(axes: Axes, lines: Mapping[str, Any]) -> None:
    if len(lines) > 1:
        axes.legend()


def _done(records: Sequence[Record]) -> list[Record]:
    return [each for each in records if each.ok]
