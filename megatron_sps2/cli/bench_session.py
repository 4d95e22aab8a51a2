"""From the flags of `sps2 bench` to a session: what its commands share.

A tokenizer, where a text is given, is the engine's; the rest is the bench floor's.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_sps2 import __version__
from megatron_sps2.bench.arrivals import ArrivalConfig
from megatron_sps2.bench.client import Endpoint, Served, ask_served
from megatron_sps2.bench.session import Session
from megatron_sps2.bench.summary import parse_slos
from megatron_sps2.bench.trace import read_trace
from megatron_sps2.bench.workload import WorkloadConfig, num_clipped
from megatron_sps2.cli.bench_arguments import KEY_VARIABLE
from megatron_sps2.cli.text import check_text, token_ids


def make_session(args: argparse.Namespace, arrivals: ArrivalConfig) -> Session:
    """Raises ValueError or OSError for everything that can be wrong before a request is sent."""
    check_outputs(args)
    if args.num_warmups < 0:
        raise ValueError(f"--num-warmups {args.num_warmups} must be 0 (none) or above")
    if args.max_concurrency is not None and args.max_concurrency < 1:
        raise ValueError(f"--max-concurrency {args.max_concurrency} must be at least 1")
    corpus = read_corpus(args)
    planned = read_trace(args.trace, args.trace_format, args.num_requests, args.seed)
    key = args.api_key or os.environ.get(KEY_VARIABLE, "")
    served = asyncio.run(ask_served(args.base_url, args.model, key))
    return Session(
        endpoint=endpoint(args, args.base_url, served.model, key),
        planned=planned,
        workload=workload_config(args, served),
        arrivals=arrivals,
        corpus=corpus,
        max_concurrency=args.max_concurrency,
    )


def endpoint(args: argparse.Namespace, base_url: str, model: str, api_key: str = "") -> Endpoint:
    if not 0 < args.request_timeout_s < math.inf:
        raise ValueError(f"--request-timeout-s {args.request_timeout_s} must be above 0 and finite")
    return Endpoint(
        base_url=base_url,
        model=model,
        api_key=api_key,
        timeout_s=args.request_timeout_s,
        ask_logprobs=args.count_tokens == "logprobs",
        extra_body={"temperature": args.temperature, **({} if args.stop_at_eos else {"ignore_eos": True})},
    )


def workload_config(args: argparse.Namespace, served: Served) -> WorkloadConfig:
    lengths = [n for n in (args.max_model_len, served.max_model_len) if n is not None]
    return WorkloadConfig(
        time_scale=args.time_scale,
        length_scale=args.length_scale,
        max_model_len=min(lengths, default=None),
        vocab_size=args.vocab_size,
        seed=args.seed,
    )


def read_corpus(args: argparse.Namespace) -> list[int] | None:
    """The token ids that prompts are cut from; None for random ones."""
    if (args.text is None) != (args.tokenizer is None):
        raise ValueError("--text FILE and --tokenizer CHECKPOINT belong together; give both or none")
    if args.text is None:
        return None
    check_text(args.text)
    return token_ids(args.text, args.tokenizer)


def check_outputs(args: argparse.Namespace) -> None:
    for flag in ("json", "html"):
        path = getattr(args, flag)
        if path and not Path(path).resolve().parent.is_dir():
            raise FileNotFoundError(f"{Path(path).parent}, the folder of --{flag}, does not exist")


def arrivals(args: argparse.Namespace) -> ArrivalConfig:
    rated = "gamma" if args.burstiness != 1 else "poisson"
    kind = args.arrivals or ("trace" if args.request_rate == math.inf else rated)
    if kind == "closed" and args.max_concurrency is None:
        raise ValueError("--arrivals closed needs a number of requests at once; give --max-concurrency")
    for flag, given, kinds in (
        ("--burstiness", args.burstiness != 1, ("gamma",)),
        ("--request-rate", args.request_rate != math.inf, ("trace", "poisson", "gamma", "constant")),
        ("--time-scale", args.time_scale != 1 and args.request_rate != math.inf, ()),
    ):
        if given and kind not in kinds:
            raise ValueError(f"{flag} says nothing beside {_beside(kind, args.request_rate)}; leave one out")
    return ArrivalConfig(
        kind=kind, request_rate=args.request_rate, burstiness=args.burstiness, seed=args.seed
    )


def _beside(kind: str, rate: float) -> str:
    return f"--arrivals {kind}" + ("" if rate == math.inf else f" --request-rate {rate:g}")


def warm_up(args: argparse.Namespace, session: Session) -> None:
    """An endpoint that fails here fails later, too: the run says how."""
    if args.num_warmups:
        with bar("warm-up", None):
            asyncio.run(session.warm_up(args.num_warmups))


def facts(args: argparse.Namespace, session: Session) -> dict[str, Any]:
    """What was run; names that vLLM has are vLLM's."""
    rate = session.arrivals.request_rate
    last = session.times()[-1]
    return {
        "backend": "openai",
        "model_id": session.endpoint.model,
        "num_prompts": len(session.planned),
        "request_rate": "inf" if rate == math.inf else rate,
        "burstiness": session.arrivals.burstiness,
        "max_concurrency": session.max_concurrency,
        "arrivals": session.arrivals.kind,
        "offered_rate": (len(session.planned) - 1) / last if last > 0 else "inf",
        "trace": trace_name(args),
        "trace_format": args.trace_format,
        "time_scale": args.time_scale,
        "length_scale": args.length_scale,
        "max_model_len": session.workload.max_model_len,
        "num_clipped": num_clipped(session.planned, session.workload),
        "seed": args.seed,
        "count_tokens": args.count_tokens,
        "goodput_limits": parse_slos(args.goodput),
        "sps2_version": __version__,
    }


def trace_name(args: argparse.Namespace) -> str:
    return str(args.trace) if args.trace_format == "synthetic" else Path(args.trace).name


def said(facts: Mapping[str, Any]) -> str:
    """In one line."""
    return ", ".join(f"{name} {_word(value)}" for name, value in facts.items() if value not in (None, {}))


def _word(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{name}:{_word(each)}" for name, each in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextmanager
def bar(what: str, total: int | None) -> Iterator[Callable[[], None]]:
    """A progress bar on a terminal's stderr, gone when done."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)
