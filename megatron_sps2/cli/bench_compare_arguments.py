"""The flags that `sps2 bench compare` alone has: which servers, which rounds. Imports nothing heavy."""

from __future__ import annotations

import argparse

from megatron_sps2.cli.arguments import add_checkpoint, add_kv_cache_dtype
from megatron_sps2.config import DTYPES

SETTINGS = "sps2-csa,sps2-exact,sarathi-512,sarathi-2048,fcfs"


def add_servers(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("servers")
    add_checkpoint(group, required=True)
    group.add_argument(
        "--settings",
        default=SETTINGS,
        metavar="A,B,C",
        help="what to compare: sps2-exact, sps2-csa, sps2-csa-PRESET, sps2-auto, sarathi-CHUNK, fcfs, "
        "fcfs-TOKENS, or a name of --define; NAME@spPtpT on another layout than --sp and --tp",
    )
    group.add_argument(
        "--define",
        action="append",
        default=[],
        metavar="NAME=FLAGS",
        help="a setting of your own by flags of sps2 serve, as in 'slo=--policy sps2 --tbt-slo-ms 200'; "
        "repeatable",
    )
    for axis, letter in (("sp", "P"), ("tp", "T")):
        group.add_argument(
            f"--{axis}", type=int, default=1, metavar=letter, help=f"{axis} ranks of each server"
        )
    group.add_argument(
        "--layouts",
        choices=("given", "fit"),
        default="given",
        help="fit: each setting on every layout of as many ranks that the model allows",
    )
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="of all servers")
    add_kv_cache_dtype(group)
    group.add_argument(
        "--kv-cache-gib",
        type=float,
        metavar="G",
        help="KV cache of each rank of all (default: as sps2 serve)",
    )
    group.add_argument(
        "--serve-flags", default="", metavar="'...'", help="more flags of sps2 serve, for all of them"
    )
    group.add_argument(
        "--one-at-a-time",
        action="store_true",
        help="only one server lives at a time, and is started anew for each turn: slower, with less memory",
    )


def add_rounds(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rounds")
    group.add_argument(
        "--rounds",
        type=int,
        default=3,
        metavar="R",
        help="parts that the trace is cut into; every setting replays each, in an order that rotates",
    )
    group.add_argument(
        "--loads",
        metavar="A,B,C",
        help="several time scales, each a whole comparison: 4 is a quarter of the load of 1 (default: "
        "--time-scale)",
    )
    group.add_argument(
        "--num-warmups",
        type=int,
        default=2,
        metavar="N",
        help="requests to each server before its first turn",
    )
    group.add_argument(
        "--request-timeout-s", type=float, default=3600.0, metavar="S", help="a longer request is an error"
    )
