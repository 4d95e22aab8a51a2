"""The flags of `sps2 doctor`."""

from __future__ import annotations

import argparse

from megatron_sps2.cli.arguments import (
    Commands,
    add_checkpoint,
    add_memory,
    add_parallel,
    add_replicas,
    command,
    finish,
)
from megatron_sps2.cli.launch_arguments import add_launch


def add_doctor(commands: Commands, name: str) -> None:
    parser = command(
        commands, name, "print what is installed, the ranks, the memory a checkpoint needs; check a cluster"
    )
    add_checkpoint(parser, required=False)
    add_parallel(parser)
    add_replicas(parser)
    add_memory(parser, longest="max_seq_len of the model")
    _add_world(parser)
    add_launch(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, nothing else")
    finish(parser)


def _add_world(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("check of a cluster")
    group.add_argument(
        "--world",
        action="store_true",
        help="start all ranks and measure between them: who reaches whom, latency and bandwidth of each "
        "axis, clocks, versions, memory; exit code 1 for a problem",
    )
    group.add_argument(
        "--megabytes", type=float, default=32, metavar="N", help="size of the large messages, of a rank"
    )
