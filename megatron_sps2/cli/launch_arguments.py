"""The flags of launch and failure: how ranks find each other, where they sit, when one counts as lost."""

from __future__ import annotations

import argparse

# What they are for a command that runs on one rank.
ALONE = {
    "backend": "auto",
    "rendezvous_timeout_s": 120.0,
    "heartbeat_timeout_s": 10.0,
    "timeout_s": 300.0,
    "bind_cores": False,
    "allow_tp_across_nodes": False,
}


def add_launch(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("launch and failure")
    group.add_argument(
        "--backend",
        choices=("auto", "nccl", "gloo"),
        default=ALONE["backend"],
        help="what carries messages; auto: nccl between CUDA devices, gloo between CPUs; with gloo several "
        "ranks may share a CUDA device, slowly, as all they send goes through host memory",
    )
    group.add_argument(
        "--rendezvous-timeout-s",
        type=float,
        default=ALONE["rendezvous_timeout_s"],
        metavar="S",
        help="how long rank 0 waits for all ranks to come before it says who is absent",
    )
    group.add_argument(
        "--heartbeat-timeout-s",
        type=float,
        default=ALONE["heartbeat_timeout_s"],
        metavar="S",
        help="a rank that is silent for so long is lost: all others name it and end; while they load, ranks "
        "have --rendezvous-timeout-s; one that dies is noticed at once",
    )
    group.add_argument(
        "--timeout-s",
        type=float,
        default=ALONE["timeout_s"],
        metavar="S",
        help="a collective that takes longer ends the run, though all ranks live",
    )
    group.add_argument(
        "--bind-cores",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="each rank keeps to its own cores, of one NUMA node where it can (default: on, unless the "
        "launcher has bound ranks already)",
    )
    group.add_argument(
        "--allow-tp-across-nodes",
        action="store_true",
        help="let a tensor-parallel group span nodes, though it exchanges in every layer",
    )


def check_launch(args: argparse.Namespace) -> None:
    """Raises ValueError for a time-out that is none."""
    for name in ("rendezvous_timeout_s", "heartbeat_timeout_s", "timeout_s"):
        value = getattr(args, name)
        if not 0 < value < float("inf"):
            raise ValueError(f"--{name.replace('_', '-')} {value} must be a number of seconds above 0")
