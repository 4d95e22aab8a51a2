"""The flags of `sps2 bench`: an endpoint, a trace, arrivals, what is written. Imports nothing heavy."""

from __future__ import annotations

import argparse

from megatron_sps2.cli.arguments import Commands, add_log_level, command
from megatron_sps2.cli.bench_compare_arguments import add_rounds, add_servers

TRACE_FORMATS = ("mooncake", "azure", "csv", "synthetic")
ARRIVALS = ("trace", "poisson", "gamma", "constant", "closed")
KEY_VARIABLE = "OPENAI_API_KEY"


def add_bench(commands: Commands, name: str) -> None:
    parser = command(commands, name, "measure an OpenAI endpoint under a trace of requests")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    _add_serve(actions, "serve")
    _add_capacity(actions, "capacity")
    _add_compare(actions, "compare")


def _add_serve(actions: Commands, name: str) -> None:
    parser = command(actions, name, "send a trace's requests at their times, and report what they took")
    _add_common(parser)
    _add_goodput(parser)
    finish(parser)


def _add_capacity(actions: Commands, name: str) -> None:
    parser = command(actions, name, "find the highest request rate that stays within limits")
    _add_common(parser)
    group = parser.add_argument_group("search")
    group.add_argument(
        "--slo",
        required=True,
        metavar="NAME:MS,...",
        help="limits such as p99_ttft_ms:2000,p99_tpot_ms:200; names as in the JSON of serve",
    )
    for flag, default, what in (
        ("--start-rate", 1.0, "requests/s of the first try"),
        ("--least-rate", 0.01, "the search gives up below it"),
        ("--most-rate", 1000.0, "the search ends at it"),
        ("--precision", 0.1, "end where the rate that misses is at most this share higher"),
    ):
        group.add_argument(flag, type=float, default=default, metavar="X", help=what)
    group.add_argument("--max-tries", type=int, default=12, metavar="N", help="rates that are tried at most")
    parser.set_defaults(goodput=[])
    finish(parser)


def _add_compare(actions: Commands, name: str) -> None:
    parser = command(
        actions, name, "replay a trace by several policies and settings in turns; ratios to sarathi"
    )
    add_servers(parser)
    add_trace(parser)
    _add_arrivals(parser)
    add_rounds(parser)
    _add_goodput(parser)
    _add_output(parser)
    parser.set_defaults(vocab_size=None)  # the model's
    finish(parser)


def _add_goodput(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("goodput")
    group.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="NAME:MS",
        help="count requests within these limits, such as ttft:2000 tpot:100; names are ttft, tpot, e2el",
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    _add_endpoint(parser)
    add_trace(parser)
    _add_arrivals(parser)
    _add_output(parser)


def _add_endpoint(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("endpoint")
    group.add_argument("--base-url", default="http://127.0.0.1:8000", metavar="U", help="with or without /v1")
    group.add_argument("--model", metavar="M", help="its name there (default: the first one served)")
    group.add_argument("--api-key", metavar="K", help=f"(default: {KEY_VARIABLE} where it is set, else none)")
    add_request(group)


def add_request(group: argparse._ActionsContainer) -> None:
    """What each request is sent with."""
    group.add_argument(
        "--request-timeout-s", type=float, default=600.0, metavar="S", help="a longer request is an error"
    )
    group.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy")
    group.add_argument(
        "--stop-at-eos",
        action="store_true",
        help="answers may end early; without it they are as long as the trace says",
    )
    group.add_argument(
        "--count-tokens",
        choices=("logprobs", "chunks"),
        default="logprobs",
        help="logprobs: ask for log-probabilities and count tokens by them; chunks: each chunk is one token",
    )
    group.add_argument(
        "--num-warmups", type=int, default=0, metavar="N", help="requests sent before, one by one"
    )


def add_trace(parser: argparse.ArgumentParser) -> None:
    """What is sent: lengths of a trace, prompts of a seed or a text."""
    group = parser.add_argument_group("requests")
    add_lengths(group)
    group.add_argument(
        "--max-model-len",
        type=int,
        metavar="N",
        help="prompt + output are clipped to it (default: what the endpoint says)",
    )
    group.add_argument(
        "--vocab-size", type=int, default=1000, metavar="N", help="random token ids are drawn below it"
    )
    group.add_argument("--text", metavar="FILE", help="cut prompts from this text, not from random ids")
    group.add_argument("--tokenizer", metavar="CHECKPOINT", help="whose tokenizer reads --text")


def add_lengths(group: argparse._ActionsContainer) -> None:
    """Which requests of which trace, and how they are scaled: sent for real, or simulated."""
    group.add_argument(
        "--trace",
        required=True,
        metavar="F",
        help="a file, or for synthetic a mix SHARE:LEAST-MOST[:LEAST-MOST of outputs],... such as "
        "0.8:128-1024,0.2:4096-8192",
    )
    group.add_argument(
        "--trace-format",
        choices=TRACE_FORMATS,
        default="mooncake",
        help="mooncake: JSONL; azure: CSV of Azure's LLM traces; csv: prompt_tokens,output_tokens and "
        "arrival_s",
    )
    group.add_argument(
        "--num-requests", type=int, metavar="N", help="the first N (default: all; synthetic: 100)"
    )
    group.add_argument(
        "--time-scale", type=float, default=1.0, metavar="X", help="arrival times are multiplied by it"
    )
    group.add_argument(
        "--length-scale", type=float, default=1.0, metavar="Y", help="prompt and output lengths are, by this"
    )
    group.add_argument("--seed", type=int, default=0, metavar="S", help="of tokens, arrivals and mixes")


def _add_arrivals(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("arrivals")
    group.add_argument(
        "--arrivals",
        choices=ARRIVALS,
        help="closed: as many at once as --max-concurrency (default: trace; poisson where a rate is given, "
        "gamma where --burstiness is)",
    )
    group.add_argument(
        "--request-rate", type=float, default=float("inf"), metavar="R", help="requests per second"
    )
    group.add_argument(
        "--burstiness", type=float, default=1.0, metavar="B", help="of gamma: 1 is poisson, less is burstier"
    )
    group.add_argument("--max-concurrency", type=int, metavar="N", help="later requests wait in the client")


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--json", metavar="OUT", help="write all numbers there, under vLLM's names")
    group.add_argument("--html", metavar="OUT", help="write a page with tables and plots there")


def finish(parser: argparse.ArgumentParser) -> None:
    add_log_level(parser)
