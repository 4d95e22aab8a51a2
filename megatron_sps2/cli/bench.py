"""`sps2 bench`: measures an endpoint. `serve` is here; the other actions have files of their own."""

from __future__ import annotations

import argparse
import asyncio
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_sps2.bench.report import (
    document,
    error_rows,
    latency_rows,
    page,
    table,
    throughput_rows,
    write_json,
)
from megatron_sps2.bench.session import Session
from megatron_sps2.bench.summary import parse_slos, summarize
from megatron_sps2.cli.bench_session import arrivals, bar, facts, make_session, said, trace_name, warm_up
from megatron_sps2.cli.process import RUN_ERROR

if TYPE_CHECKING:
    from megatron_sps2.bench.record import Record


def run(args: argparse.Namespace) -> int:
    if args.action == "serve":
        return _serve(args)
    return int(importlib.import_module(f"megatron_sps2.cli.bench_{args.action}").run(args))


def _serve(args: argparse.Namespace) -> int:
    slos = parse_slos(args.goodput)
    session = make_session(args, arrivals(args))
    warm_up(args, session)
    with bar("requests", len(session.planned)) as step:
        records = asyncio.run(session.send(on_done=lambda _: step()))
    summary = summarize(records, slos=slos)
    _print_summary(summary, f"{session.endpoint.model} at {args.base_url}")
    if args.json:
        write_json(args.json, document(facts(args, session), summary, records))
    if args.html:
        Path(args.html).write_text(_page(args, session, summary, records), encoding="utf-8")
    return 0 if summary["completed"] else RUN_ERROR


def _print_summary(summary: Mapping[str, Any], title: str) -> None:
    from rich.console import Console

    console = Console()
    console.print(table(latency_rows(summary), title))
    console.print(table(throughput_rows(summary)))
    if summary["failed"]:
        console.print(table(error_rows(summary)))


def _page(
    args: argparse.Namespace, session: Session, summary: Mapping[str, Any], records: Sequence[Record]
) -> str:
    from megatron_sps2.bench.figures import distributions, throughput, timeline

    runs = {session.endpoint.model: records}
    tables = [latency_rows(summary), throughput_rows(summary)]
    return page(
        f"{session.endpoint.model} under {trace_name(args)}",
        said(facts(args, session)),
        tables + ([error_rows(summary)] if summary["failed"] else []),
        [distributions(runs), timeline(records), throughput(runs)],
    )
