"""`sps2 bench capacity`: tries rates until the highest one within the limits is known."""

from __future__ import annotations

import argparse
import asyncio
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_sps2.bench.arrivals import ArrivalConfig
from megatron_sps2.bench.capacity import SearchConfig, Try, best, missed, parse_limits, search, worst
from megatron_sps2.bench.report import date, page, write_json
from megatron_sps2.bench.session import Session
from megatron_sps2.bench.summary import summarize
from megatron_sps2.cli.bench_session import bar, facts, make_session, said, warm_up
from megatron_sps2.cli.process import RUN_ERROR


def run(args: argparse.Namespace) -> int:
    limits = parse_limits(args.slo)
    config = SearchConfig(
        start_rate=args.start_rate,
        least_rate=args.least_rate,
        most_rate=args.most_rate,
        precision=args.precision,
        max_tries=args.max_tries,
    )
    session = make_session(args, _arrivals(args))
    warm_up(args, session)
    tries = search(_attempts(session, limits), config)
    good, bad = best(tries), worst(tries)
    _print_capacity(good, bad)
    if args.json:
        write_json(args.json, _document(args, session, limits, tries))
    if args.html:
        Path(args.html).write_text(_page(args, session, limits, tries), encoding="utf-8")
    return 0 if good else RUN_ERROR


def _arrivals(args: argparse.Namespace) -> ArrivalConfig:
    if args.arrivals == "closed":
        raise ValueError("--arrivals closed has no rate to search for; use trace, poisson, gamma or constant")
    if args.request_rate != math.inf:
        raise ValueError(f"--request-rate {args.request_rate}: the search chooses rates; use --start-rate")
    kind = args.arrivals or ("gamma" if args.burstiness != 1 else "poisson")
    return ArrivalConfig(kind=kind, request_rate=args.start_rate, burstiness=args.burstiness, seed=args.seed)


def _attempts(session: Session, limits: Mapping[str, float]) -> Callable[[float], Try]:
    """Each with tokens of its own, so that a later try finds nothing in the cache; says what came of it."""
    salts = iter(range(1, 1_000_000))

    def attempt(rate: float) -> Try:
        now = replace(session, arrivals=replace(session.arrivals, request_rate=rate))
        with bar(f"{rate:.4g} requests/s", len(now.planned)) as step:
            records = asyncio.run(now.send(next(salts), lambda _: step()))
        summary = summarize(records)
        found = Try(rate, summary, missed(summary, limits))
        values = ", ".join(f"{name} {_value(summary[name])}" for name in limits)
        verdict = "ok" if found.ok else f"missed: {'; '.join(found.missed)}"
        print(f"{rate:.4g} requests/s: {values}; {verdict}", flush=True)
        return found

    return attempt


def _value(number: float | None) -> str:
    return "-" if number is None else f"{number:.4g}"


def _print_capacity(good: Try | None, bad: Try | None) -> None:
    if good is None:
        assert bad is not None, "a try is good or bad"
        print(f"capacity: none; {bad.rate:.4g} requests/s is too much already")
        return
    above = f"{bad.rate:.4g} is too much" if bad else "no higher rate was tried"
    print(f"capacity: {good.rate:.4g} requests/s; {above}")


def _document(
    args: argparse.Namespace, session: Session, limits: Mapping[str, float], tries: Sequence[Try]
) -> dict[str, Any]:
    good, bad = best(tries), worst(tries)
    return {
        "date": date(),
        **_facts(args, session),
        "request_rate": good.rate if good else None,
        "too_high_rate": bad.rate if bad else None,
        "slo": limits,
        "tries": [
            {"request_rate": each.rate, "met": each.ok, "missed": each.missed, **each.summary}
            for each in tries
        ],
    }


def _facts(args: argparse.Namespace, session: Session) -> dict[str, Any]:
    """Without what each try has of its own."""
    own = ("request_rate", "offered_rate", "goodput_limits")
    return {name: value for name, value in facts(args, session).items() if name not in own}


def _page(
    args: argparse.Namespace, session: Session, limits: Mapping[str, float], tries: Sequence[Try]
) -> str:
    from megatron_sps2.bench.figures import load_curves

    name = session.endpoint.model
    by_rate = sorted(tries, key=lambda each: each.rate)
    rows = [["requests/s", *limits, "answered/s", "verdict"]]
    for each in by_rate:
        values = [_value(each.summary[limit]) for limit in limits]
        answered = f"{each.summary['request_throughput']:.4g}"
        rows.append([f"{each.rate:.4g}", *values, answered, "; ".join(each.missed) or "within the limits"])
    curves = load_curves({name: [each.summary for each in by_rate]}, list(limits), limits)
    return page(f"Capacity of {name}", said(_facts(args, session)), [rows], [curves])
