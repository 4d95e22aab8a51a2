"""The flags of `sps2 serve` and the settings they make. Names are vLLM's where it has one."""

from __future__ import annotations

import argparse
import os

from megatron_sps2.cli.arguments import Commands, add_engine, add_replicas, command, finish
from megatron_sps2.config import BATCHED_TOKENS, POLICY_NAMES, PREEMPTION_MODES, ScheduleConfig

KEY_VARIABLE = "SPS2_API_KEY"


def add_serve(commands: Commands, name: str) -> None:
    parser = command(
        commands, name, "serve a model over HTTP: OpenAI's API, Megatron's, metrics, a live page"
    )
    add_engine(parser)
    add_replicas(parser)
    _add_http(parser)
    _add_schedule(parser)
    _add_robustness(parser)
    _add_processes(parser)
    parser.add_argument(
        "--trace", metavar="FILE", help="write a Chrome/Perfetto trace of all ranks at the end"
    )
    finish(parser)


def _add_http(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("HTTP")
    group.add_argument(
        "--host", default="127.0.0.1", metavar="H", help="address to listen on; 0.0.0.0 is all"
    )
    group.add_argument(
        "--port", type=int, default=8000, metavar="N", help="port to listen on; 0 is any free one"
    )
    group.add_argument(
        "--port-file", metavar="FILE", help="write the port there once it listens, for --port 0"
    )
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="K",
        help=f"a key that clients must send; repeatable (default: {KEY_VARIABLE} where it is set, else none)",
    )
    group.add_argument(
        "--served-model-name", metavar="NAME", help="the model's name in the API (default: the folder's name)"
    )
    group.add_argument(
        "--max-body-mib", type=float, default=32.0, metavar="N", help="larger request bodies are refused"
    )


def _add_schedule(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("scheduling and memory")
    add_policy(group)
    group.add_argument(
        "--kv-cache-gib",
        type=float,
        metavar="G",
        help="KV cache of each rank (default: on CUDA what --gpu-memory-utilization leaves; on CPU what "
        "--max-num-seqs requests of --max-model-len need, 2 at most, but room for one)",
    )
    group.add_argument(
        "--gpu-memory-utilization",
        type=float,
        default=0.9,
        metavar="F",
        help="share of a CUDA device's memory that may be taken: the KV cache gets what the weights and the "
        "largest prefill, measured at the start, leave of it",
    )


def add_policy(group: argparse._ActionsContainer) -> None:
    """What the scheduler is told, a real one or a simulated one."""
    group.add_argument(
        "--policy",
        choices=POLICY_NAMES,
        default="sps2",
        help="sps2: decodes apart from prefills, which pause between layers; sarathi: chunked prefill mixed "
        "with decodes; fcfs: whole prompts first",
    )
    group.add_argument(
        *("--max-num-seqs", "--inference-max-requests"),
        type=int,
        default=64,
        metavar="N",
        help="requests of a replica that are prefilled or decoded at the same time",
    )
    group.add_argument(
        "--max-num-batched-tokens",
        type=int,
        metavar="N",
        help="tokens of a step: sarathi's chunk and decodes, fcfs's prompts, sps2's short prompts on a rank "
        f"(default: {', '.join(f'{policy} {count}' for policy, count in BATCHED_TOKENS.items())})",
    )
    group.add_argument(
        "--tbt-slo-ms",
        type=float,
        metavar="X",
        help="sps2: time between two tokens of an answer to aim for; a larger one lets prompts through "
        "faster (default: about two decode steps, up to five where prompts queue)",
    )
    group.add_argument(
        "--short-prompt-tokens",
        type=int,
        default=512,
        metavar="N",
        help="sps2: prompts up to this length live wholly on one sp rank",
    )
    group.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="prompts that begin like an earlier one reuse its KV blocks; exact attention only (default: on)",
    )
    group.add_argument(
        "--preemption",
        choices=PREEMPTION_MODES,
        default="recompute",
        help="what becomes of a request that must make room: computed again, or swapped to host memory",
    )
    group.add_argument(
        "--num-kv-blocks", type=int, metavar="N", help="KV blocks of each rank, instead of what memory leaves"
    )


def _add_processes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("processes")
    group.add_argument(
        "--role",
        choices=("all", "front-end", "engine"),
        default="all",
        help="start the HTTP front end, or the ranks, alone: such a front end outlives the jobs that run its "
        "engine, and answers 503 between two of them",
    )
    group.add_argument(
        "--engine-address",
        metavar="HOST:PORT",
        help="with --role: where the front end listens for its engine, on this port and the next; not "
        "encrypted, a network of your own is assumed",
    )
    group.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="without a launcher: start the ranks again after a failure, N times; the front end answers 503 "
        "meanwhile (under torchrun use its own --max-restarts)",
    )


def _add_robustness(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--max-queue",
        type=int,
        default=256,
        metavar="N",
        help="requests that may wait beyond --max-num-seqs; more are answered with 429",
    )
    group.add_argument(
        "--request-timeout-s",
        type=float,
        metavar="S",
        help="longest time of a request that does not say (default: none)",
    )
    group.add_argument(
        "--drain-timeout-s",
        type=float,
        default=30.0,
        metavar="S",
        help="on SIGTERM, how long running requests may take to finish",
    )


def schedule_config(args: argparse.Namespace) -> ScheduleConfig:
    return ScheduleConfig(
        policy=args.policy,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens or BATCHED_TOKENS[args.policy],
        short_prompt_tokens=args.short_prompt_tokens,
        tbt_slo_ms=args.tbt_slo_ms,
        preemption=args.preemption,
        prefix_caching=args.enable_prefix_caching,
    )


def api_keys(args: argparse.Namespace) -> tuple[str, ...]:
    """Raises ValueError for an empty key, which would let everybody in or nobody."""
    keys = tuple(args.api_key) or tuple(filter(None, [os.environ.get(KEY_VARIABLE)]))
    if not all(key.strip() for key in keys):
        raise ValueError("--api-key is empty; give a key, or leave the flag out to serve without keys")
    return keys


def check_limits(args: argparse.Namespace) -> None:
    """Raises ValueError for a number that no server can work with."""
    if not 0 <= args.port < 65536:
        raise ValueError(f"--port {args.port} must lie in 0..65535; 0 is any free port")
    if (args.role == "all") != (args.engine_address is None):
        raise ValueError(
            f"--role {args.role} and --engine-address {args.engine_address}: --role front-end and --role "
            "engine find each other at --engine-address HOST:PORT, --role all needs none"
        )
    if args.max_restarts < 0:
        raise ValueError(f"--max-restarts {args.max_restarts} must be 0 (none) or above")
    if args.max_queue < 0:
        raise ValueError(f"--max-queue {args.max_queue} must be 0 (none may wait) or above")
    for name in (
        "max_body_mib",
        "drain_timeout_s",
        "request_timeout_s",
        "kv_cache_gib",
    ):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} {value} must be above 0 and finite")
    if not 0 < args.gpu_memory_utilization <= 1:
        raise ValueError(
            f"--gpu-memory-utilization {args.gpu_memory_utilization} must be above 0 and at most 1"
        )
    for name in ("max_num_batched_tokens", "num_kv_blocks"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} {value} must be at least 1")
