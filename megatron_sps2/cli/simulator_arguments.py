"""The flags of `sps2 profile`, `simulate` and `plan`. Imports nothing heavy."""

from __future__ import annotations

import argparse

from megatron_sps2.cli.arguments import Commands, add_engine, add_kv_cache_dtype, command, finish
from megatron_sps2.cli.bench_arguments import add_lengths
from megatron_sps2.cli.serve_arguments import add_policy
from megatron_sps2.config import ATTENTION_MODES, DTYPES


def add_profile(commands: Commands, name: str) -> None:
    parser = command(
        commands, name, "measure what this machine's ranks can do, for `sps2 simulate` and `sps2 plan`"
    )
    add_engine(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="where to write the profile, JSON")
    parser.add_argument(
        "--budget-s", type=float, default=60.0, metavar="S", help="seconds to measure for, about"
    )
    finish(parser)


def add_simulate(commands: Commands, name: str) -> None:
    parser = command(
        commands, name, "run a trace through the scheduler on a simulated cluster: TTFT, TBT, throughput"
    )
    _add_cluster(parser)
    for flag, what in {
        "--sp": "sequence-parallel ranks",
        "--tp": "tensor-parallel ranks",
        "--dp": "replicas",
    }.items():
        parser.add_argument(flag, type=int, default=1, metavar="N", help=what)
    _add_schedule(parser)
    _add_trace(parser)
    finish(parser)


def add_plan(commands: Commands, name: str) -> None:
    parser = command(
        commands,
        name,
        "say which ranks, attention and policy serve a workload on a cluster, and why",
    )
    _add_cluster(parser)
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes of the cluster")
    parser.add_argument("--devices-per-node", type=int, metavar="N", help="(default: what the profile says)")
    parser.add_argument(
        "--longest", type=int, metavar="N", help="tokens of a request at most (default: the trace's longest)"
    )
    parser.add_argument(
        "--settings",
        default="sps2-exact,sps2-csa,sarathi-512,sarathi-2048,fcfs",
        metavar="A,B",
        help="policies and attention to try: sps2-exact, sps2-csa, sarathi-CHUNK, fcfs",
    )
    parser.add_argument(
        "--max-num-seqs", type=int, default=64, metavar="N", help="requests at a time, a replica"
    )
    for what in ("ttft", "tbt"):
        parser.add_argument(
            f"--{what}-slo-ms",
            type=float,
            metavar="X",
            help=f"aim for a p99 of {what.upper()} below it",
        )
    _add_trace(parser)
    finish(parser)


def _add_cluster(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("cluster and model")
    group.add_argument(
        "--profile",
        required=True,
        metavar="FILE|NAME",
        help="a file of `sps2 profile`, or h100, h200, a100: from data sheets, not measured",
    )
    group.add_argument(
        "--model",
        required=True,
        metavar="DIR|NAME",
        help="a checkpoint's folder, or such as llama3-8b",
    )
    group.add_argument(
        "--dtype", choices=DTYPES, default="bfloat16", help="dtype of weights, KV and computing"
    )
    add_kv_cache_dtype(group)
    group.add_argument("--csa-setting", default="default", metavar="NAME|FILE", help="a preset or a file")
    group.add_argument(
        "--csa-density",
        type=float,
        metavar="X",
        help="share that CSA keeps of the keys before its window (default: as measured on a small model)",
    )


def _add_schedule(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("scheduling")
    add_policy(group)
    group.add_argument("--attention", choices=ATTENTION_MODES, default="exact", help="of prompts")
    group.add_argument(
        "--max-model-len", type=int, metavar="N", help="prompt + output (default: the trace's longest)"
    )


def _add_trace(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("requests")
    add_lengths(group)
    group.add_argument(
        "--request-rate",
        type=float,
        metavar="R",
        help="Poisson arrivals at so many per second (default: the trace's own times)",
    )
    group.add_argument("--json", metavar="OUT", help="write all numbers there; - is stdout, and nothing else")
