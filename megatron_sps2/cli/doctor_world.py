"""`sps2 doctor --world`: on every rank of the world, what a job will meet there; rank 0 prints it.

Gathers and prints. parallel/probe.py measures, problems.py judges.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
from dataclasses import asdict
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from megatron_sps2.cli.arguments import check_size_flags, parallel_config
from megatron_sps2.cli.device import ranks_per_device
from megatron_sps2.cli.doctor import memory_per_rank
from megatron_sps2.cli.installed import versions
from megatron_sps2.cli.process import RUN_ERROR
from megatron_sps2.cli.world import in_world
from megatron_sps2.model.manifest import load_model_config
from megatron_sps2.parallel.activity import Activity
from megatron_sps2.parallel.host import host_memory, num_cores
from megatron_sps2.parallel.rank_env import RankEnv

if TYPE_CHECKING:
    from megatron_sps2.parallel.groups import ParallelGroups
    from megatron_sps2.parallel.probe import Pair

AXES = ("sp", "tp", "dp", "world")
MEGABYTE = 1_000_000
Found = dict[str, Any]


def run_world(args: argparse.Namespace) -> int:
    # Ranks end with 1 when rank 0 has printed a problem: nothing is left to explain.
    return in_world(args, _examine, _check, explained=RUN_ERROR)


def _check(args: argparse.Namespace) -> None:
    if not 0 < args.megabytes < float("inf"):
        raise ValueError(f"--megabytes {args.megabytes} must be above 0 and finite")
    if args.checkpoint:
        check_size_flags(args, load_model_config(args.checkpoint))


def _examine(args: argparse.Namespace) -> int:
    """On every rank -> 1 when there is a problem, on all alike; rank 0 speaks."""
    from megatron_sps2.parallel.groups import ParallelGroups

    args.heart.watch(Activity())
    groups = ParallelGroups.create(parallel_config(args), timeout=timedelta(seconds=args.timeout_s))
    found = measure(args, groups)
    if groups.world.rank == 0:
        print(json.dumps(found), flush=True) if args.json else print_world(found)
    return RUN_ERROR if found["problems"] else 0


def measure(args: argparse.Namespace, groups: ParallelGroups) -> Found:
    """All that is known of the world, and what is wrong with it; the same on every rank. Collective."""
    from megatron_sps2.parallel.collectives import gather_objects
    from megatron_sps2.parallel.probe import clocks, measure_pairs, unreached

    world, num_bytes = groups.world, int(args.megabytes * MEGABYTE)
    mine = {"ranks": _place(args, groups), "versions": versions(), "memory": _memory(args)}
    everybody = gather_objects(mine, world)
    found: Found = {name: [each[name] for each in everybody] for name in mine}
    found["unreached"] = gather_objects(unreached(world, args.device), world)
    found["axes"] = _axes(args, groups, num_bytes)
    pairs = measure_pairs(world, args.device, num_bytes, lambda rank: _name(found["ranks"][rank]))
    found["pairs"] = [asdict(pair) for pair in pairs]
    found["clocks"] = [asdict(clock) for clock in clocks(pairs)]
    return {**found, "problems": _problems(found), "warnings": _warnings(found["ranks"], pairs)}


def _problems(found: Found) -> list[str]:
    from megatron_sps2.cli import problems

    hosts, memory = [rank["host"] for rank in found["ranks"]], found["memory"]
    needs = [
        problems.Need(
            rank=rank["rank"], place=each["place"], needed_bytes=each["needed"], free_bytes=each["free"]
        )
        for rank, each in zip(found["ranks"], memory, strict=True)
        if each["needed"]
    ]
    return [
        *problems.reach_problems(found["unreached"], hosts),
        *problems.version_problems(found["versions"], hosts),
        *problems.memory_problems(needs, memory[0]["max_model_len"] or 0),
    ]


def _warnings(ranks: list[Found], pairs: list[Pair]) -> list[str]:
    from megatron_sps2.cli import problems
    from megatron_sps2.parallel.probe import clocks

    hosts = [rank["host"] for rank in ranks]
    return [*problems.clock_warnings(clocks(pairs), hosts), *problems.link_warnings(pairs, hosts)]


def _place(args: argparse.Namespace, groups: ParallelGroups) -> Found:
    """Who this rank is, and where."""
    import torch

    env = RankEnv.detect() or RankEnv.alone()
    return {
        "rank": groups.world.rank,
        **{f"{axis}_rank": getattr(groups, axis).rank for axis in ("dp", "sp", "tp")},
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "launcher": env.launcher,
        "local_rank": env.local_rank,
        "device": args.device,
        "cores": num_cores(),
        "threads": torch.get_num_threads(),
    }


def _memory(args: argparse.Namespace) -> Found:
    """In bytes. `place` is where this rank's model will lie, and `free` and `needed` are of it."""
    import torch

    host, (free, total) = socket.gethostname(), host_memory()
    found: Found = {"place": f"host {host}", "host_free": free, "host_total": total}
    if args.device.startswith("cuda"):
        sharing = ranks_per_device(RankEnv.detect() or RankEnv.alone(), torch.cuda.device_count())
        free, total = (amount // sharing for amount in torch.cuda.mem_get_info(args.device))
        found["place"] += f", {args.device}"
    found |= {"free": free, "total": total, "needed": None, "max_model_len": None}
    if args.checkpoint:
        need = memory_per_rank(args, load_model_config(args.checkpoint))
        found["needed"] = need["total_bytes"] + need["activation_bytes"]
        found["max_model_len"] = need["max_model_len"]
    return found


def _axes(args: argparse.Namespace, groups: ParallelGroups, num_bytes: int) -> Found:
    """By axis of more than one rank: each rank's latency and bandwidth in its own group, and the worst."""
    from megatron_sps2.parallel.collectives import gather_objects
    from megatron_sps2.parallel.probe import measure_axis

    found = {}
    for name in AXES:
        axis = getattr(groups, name)
        if axis.size == 1:
            continue
        speeds = gather_objects(measure_axis(axis, args.device, num_bytes), groups.world)
        latencies, rates = [s.latency_us for s in speeds], [s.mb_per_s for s in speeds]
        found[name] = {
            "size": axis.size,
            "latency_us": max(latencies),
            "mb_per_s": min(rates),
            "slowest_rank": rates.index(min(rates)),
            "latency_us_by_rank": latencies,
            "mb_per_s_by_rank": rates,
        }
    return found


# Printing.


def print_world(found: Found) -> None:
    console = Console()
    for table in (_rank_table(found), _axis_table(found["axes"]), _clock_table(found)):
        if table.row_count:
            console.print(table)
    if found["pairs"]:
        slowest = min(found["pairs"], key=lambda pair: pair["mb_per_s"])
        names = " and ".join(_name(found["ranks"][rank]) for rank in slowest["ranks"])
        rate, late = slowest["mb_per_s"], slowest["latency_us"]
        console.print(f"slowest pair: {names}, {rate:,.0f} MB/s, {late:,.0f} us one way", soft_wrap=True)
    for kind in ("warnings", "problems"):
        for text in found[kind]:
            console.print(f"{kind[:-1]}: {text}", soft_wrap=True, markup=False)
    if not found["problems"]:
        console.print(f"no problem found in a world of {len(found['ranks'])}")


def _name(rank: Found) -> str:
    return f"rank {rank['rank']} (host {rank['host']})"


def _rank_table(found: Found) -> Table:
    launcher = found["ranks"][0]["launcher"]
    table = Table(
        title=f"ranks, launcher {launcher}; free and needed: GiB of the device", title_justify="left"
    )
    for name in ("rank", "dp,sp,tp", "host", "pid", "device", "cores", "threads", "free", "needed"):
        table.add_column(name, no_wrap=True)
    for rank, memory in zip(found["ranks"], found["memory"], strict=True):
        grid = ",".join(str(rank[f"{axis}_rank"]) for axis in ("dp", "sp", "tp"))
        facts = [str(rank[name]) for name in ("host", "pid", "device", "cores", "threads")]
        table.add_row(str(rank["rank"]), grid, *facts, _gib(memory["free"]), _gib(memory["needed"]))
    return table


def _axis_table(axes: Found) -> Table:
    table = Table(title="all-to-all, of the slowest rank", title_justify="left")
    for name in ("axis", "ranks", "latency", "bandwidth", "slowest rank"):
        table.add_column(name)
    for name, axis in axes.items():
        late, rate = f"{axis['latency_us']:,.0f} us", f"{axis['mb_per_s']:,.0f} MB/s a rank"
        table.add_row(name, str(axis["size"]), late, rate, str(axis["slowest_rank"]))
    return table


def _clock_table(found: Found) -> Table:
    table = Table(title="clocks, beside rank 0's", title_justify="left")
    for name in ("rank", "offset", "+-"):
        table.add_column(name)
    for clock in found["clocks"]:
        table.add_row(
            str(clock["rank"]), f"{clock['offset_ms']:,.3f} ms", f"{clock['plus_minus_ms']:,.3f} ms"
        )
    return table


def _gib(num_bytes: int | None) -> str:
    return "" if num_bytes is None else f"{num_bytes / 2**30:,.1f}"
