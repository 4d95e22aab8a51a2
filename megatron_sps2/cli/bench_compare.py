"""`sps2 bench compare`: one trace through several policies and settings, in turns; ratios to sarathi."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from megatron_sps2.bench.client import Served
from megatron_sps2.bench.compare_page import NOTES, comparison_page
from megatron_sps2.bench.compare_tables import sheets
from megatron_sps2.bench.comparison import Comparison
from megatron_sps2.bench.fleet import Fleet
from megatron_sps2.bench.record import Record
from megatron_sps2.bench.report import table, write_json
from megatron_sps2.bench.setting import Setting, fitting_layouts, parse_definitions, parse_settings, spread
from megatron_sps2.bench.summary import parse_slos
from megatron_sps2.bench.trace import Planned, read_trace
from megatron_sps2.bench.turns import Replay, Schedule, Turn, parts, take_turns
from megatron_sps2.cli.bench_session import arrivals, check_outputs, read_corpus, trace_name, workload_config
from megatron_sps2.cli.provenance import provenance
from megatron_sps2.config import ModelConfig, ParallelConfig
from megatron_sps2.model.manifest import load_model_config

MODEL = "compared"  # its name at every server
WIDTH = 160  # of tables that go to a file
MIN_QUEUE = 256  # sps2 serve's own


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is compared, checked before any server starts."""

    settings: list[Setting]
    left_out: dict[str, str]  # layouts, and why
    planned: list[Planned]
    schedule: Schedule
    flags: dict[str, tuple[str, ...]]  # of each server
    slos: dict[str, float]


def run(args: argparse.Namespace) -> int:
    wanted = prepare(args)
    args.tokenizer = args.tokenizer or (args.checkpoint if args.text else None)
    corpus = read_corpus(args)
    facts = _facts(args, wanted)
    turns, cut = list[Turn](), None
    try:
        with _ending_servers():
            _measure(args, wanted, corpus, turns)
    except (RuntimeError, KeyboardInterrupt, SystemExit) as error:  # a server was lost, or we are to end
        if not turns:
            raise
        cut = error
    comparison = Comparison(wanted.settings, turns, wanted.slos)
    results = {**facts, "error": repr(cut) if cut else "", **comparison.to_json()}
    _show(args, comparison, results)
    if cut:  # what was measured before it is there
        raise cut
    return 0


def prepare(args: argparse.Namespace) -> Wanted:
    """Raises ValueError or OSError for anything that a server or the trace would not bear."""
    model = load_model_config(args.checkpoint)
    settings, left_out = _settings(args, model)
    check_outputs(args)
    planned = read_trace(args.trace, args.trace_format, args.num_requests, args.seed)
    schedule = _schedule(args, model, settings)
    parts(planned, args.rounds)
    common = _common_flags(args, schedule, len(planned))
    flags = {each.name: (*common, *each.serve_flags) for each in settings}
    return Wanted(
        settings=settings,
        left_out=left_out,
        planned=planned,
        schedule=schedule,
        flags=flags,
        slos=parse_slos(args.goodput),
    )


def _settings(args: argparse.Namespace, model: ModelConfig) -> tuple[list[Setting], dict[str, str]]:
    parallel = ParallelConfig(sp_size=args.sp, tp_size=args.tp)
    settings = parse_settings(args.settings, parallel, parse_definitions(args.define))
    left_out = dict[str, str]()
    if args.layouts == "fit":
        fit, left_out = fitting_layouts(parallel.world_size, model)
        settings = spread(settings, fit)
    for each in settings:
        each.parallel.check_model(model)
    return settings, left_out


def _schedule(args: argparse.Namespace, model: ModelConfig, settings: Sequence[Setting]) -> Schedule:
    if args.max_model_len is not None and not 2 <= args.max_model_len <= model.max_seq_len:
        raise ValueError(
            f"--max-model-len {args.max_model_len} must lie in 2..{model.max_seq_len}, what the model allows"
        )
    args.vocab_size = args.vocab_size or model.vocab_size
    return Schedule(
        settings=[each.name for each in settings],
        loads=_loads(args),
        num_rounds=args.rounds,
        workload=workload_config(args, Served(MODEL, model.max_seq_len)),
        arrivals=arrivals(args),
        max_concurrency=args.max_concurrency,
        model=MODEL,
        num_warmups=args.num_warmups,
        timeout_s=args.request_timeout_s,
    )


def _loads(args: argparse.Namespace) -> list[float]:
    if args.loads is None:
        return [args.time_scale]
    try:
        return [float(text) for text in args.loads.split(",")]
    except ValueError as error:
        raise ValueError(
            f"--loads {args.loads!r} must be numbers with commas between, as in 4,2,1: {error}"
        ) from error


def _common_flags(args: argparse.Namespace, schedule: Schedule, num_requests: int) -> tuple[str, ...]:
    """The same model, memory and limits for all."""
    cached = () if args.kv_cache_dtype == "auto" else ("--kv-cache-dtype", args.kv_cache_dtype)
    memory = () if args.kv_cache_gib is None else ("--kv-cache-gib", str(args.kv_cache_gib))
    return (
        *("--checkpoint", str(args.checkpoint), "--dtype", args.dtype, *cached, *memory),
        *("--max-model-len", str(schedule.workload.max_model_len)),
        # An overloaded server answers late, which is what is measured, and turns nobody away.
        *("--max-queue", str(max(MIN_QUEUE, num_requests)), "--served-model-name", schedule.model),
        *shlex.split(args.serve_flags),
    )


def _measure(args: argparse.Namespace, wanted: Wanted, corpus: list[int] | None, turns: list[Turn]) -> None:
    """Fills `turns`."""
    schedule, console = wanted.schedule, Console(stderr=True)
    total = len(wanted.planned) * len(schedule.settings) * len(schedule.loads)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with Fleet(wanted.flags, one_at_a_time=args.one_at_a_time) as fleet, progress:
        task = progress.add_task("starting servers", total=total)
        fleet.start(lambda name: progress.update(task, description=f"starting {name}"))

        def on_start(replay: Replay, name: str) -> None:
            where = f"round {replay.round + 1} of {schedule.num_rounds}, x {replay.load:g}, {name}"
            progress.update(task, description=where)

        def on_done(record: Record) -> None:
            progress.advance(task)

        for turn in take_turns(fleet, schedule, wanted.planned, corpus, on_start, on_done):
            turns.append(turn)
            console.print(_said(turn), highlight=False, soft_wrap=True)


@contextmanager
def _ending_servers() -> Iterator[None]:
    """SIGTERM leaves by the way of an exception, so that the servers end with us."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _said(turn: Turn) -> str:
    """One line of what a turn took."""
    done = [record for record in turn.records if record.ok]
    text = f"round {turn.round + 1}, x {turn.load:g}, {turn.setting}: {len(done)} of {len(turn.records)}"
    text += " answered"
    if not done:
        return text
    ttft, e2e = (sum(times) / len(done) for times in ([r.ttft_s for r in done], [r.e2e_s for r in done]))
    return f"{text}, mean TTFT {ttft:.2f} s, response {e2e:.2f} s"


def _facts(args: argparse.Namespace, wanted: Wanted) -> dict[str, Any]:
    """What was run, on what."""
    schedule = wanted.schedule
    return {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "command": _line(("sps2", *sys.argv[1:])),
        **provenance(),
        "model_id": Path(args.checkpoint).resolve().name,
        "dtype": args.dtype,
        "kv_cache_dtype": args.kv_cache_dtype,
        "prompts": f"cut from {Path(args.text).name}" if args.text else "random token ids",
        "trace": trace_name(args),
        "arrivals": schedule.arrivals.kind,
        "num_prompts": len(wanted.planned),
        "length_scale": args.length_scale,
        "max_model_len": schedule.workload.max_model_len,
        "seed": args.seed,
        "rounds": schedule.num_rounds,
        "num_warmups": schedule.num_warmups,
        "one_at_a_time": args.one_at_a_time,
        "loads": sorted(schedule.loads, reverse=True),
        "settings": {each.name: _line(wanted.flags[each.name]) for each in wanted.settings},
        "left_out": wanted.left_out,
        "notes": NOTES,
    }


def _line(words: Sequence[str]) -> str:
    """A command. Of a path its last part, as the result is read on other machines."""
    return shlex.join(Path(word).name if os.sep in word and word[0] != "-" else word for word in words)


def _show(args: argparse.Namespace, comparison: Comparison, results: dict[str, Any]) -> None:
    """Tables on stdout, and the files that were asked for."""
    if args.json:
        write_json(args.json, results)
    if args.html:
        Path(args.html).write_text(comparison_page(comparison, results), encoding="utf-8")
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    for sheet in sheets(results):
        console.print(table(sheet.lines, sheet.title))
        console.print(sheet.note, style="dim", highlight=False, soft_wrap=True)
    if results["error"]:
        text = f"cut short by {results['error']}: rounds that a setting did not finish are left out"
        console.print(text, highlight=False, soft_wrap=True)
    for name, reason in results["left_out"].items():
        console.print(f"left out: {name}: {reason}", highlight=False, soft_wrap=True)
