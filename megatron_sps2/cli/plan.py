"""`sps2 plan`: which ranks, attention and policy for a model, a cluster and a workload, and why."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from megatron_sps2.cli.planned import STDOUT, longest_of, read_planned, write
from megatron_sps2.config import ParallelConfig
from megatron_sps2.csa_setting import load_setting
from megatron_sps2.simulator.arrivals import Arrival
from megatron_sps2.simulator.data_sheets import load_profile
from megatron_sps2.simulator.deployment import Deployment
from megatron_sps2.simulator.planner import Plan, Targets, Verdict, choose, why
from megatron_sps2.simulator.setting import Setting
from megatron_sps2.simulator.shapes import load_shape

SHOWN = 12


def run(args: argparse.Namespace) -> int:
    settings = [Setting.parse(name) for name in args.settings.split(",")]
    base, planned = _read(args, settings)
    targets = Targets(ttft_ms=args.ttft_slo_ms, tbt_ms=args.tbt_slo_ms)
    num_devices = args.nodes * base.profile.devices_per_node
    plan = choose(
        base, settings, num_devices, planned, targets, _tell if sys.stderr.isatty() else lambda line: None
    )
    write(args.json, plan.to_json() | {"model": args.model, "num_devices": num_devices})
    if args.json != STDOUT:
        _print(plan)
    return 0


def _read(args: argparse.Namespace, settings: Sequence[Setting]) -> tuple[Deployment, list[Arrival]]:
    model, profile = load_shape(args.model), load_profile(args.profile)
    if args.nodes < 1:
        raise ValueError(f"--nodes {args.nodes} must be at least 1")
    if args.devices_per_node is not None:
        profile = replace(profile, devices_per_node=args.devices_per_node)
    csa = load_setting(args.csa_setting)
    if any(each.attention != "exact" for each in settings):
        csa.check_model(model, "")
    planned = read_planned(args, args.longest or model.max_seq_len)
    base = Deployment(
        model=model,
        profile=profile,
        parallel=ParallelConfig(),
        setting=Setting.parse("sps2-exact"),
        longest=args.longest or longest_of(planned),
        dtype=args.dtype,
        kv_cache_dtype=args.kv_cache_dtype,
        max_num_seqs=args.max_num_seqs,
        tbt_slo_ms=args.tbt_slo_ms,
        csa=csa,
        csa_beyond=args.csa_density,
    )
    return base, planned


def _tell(line: str) -> None:
    print(f"sps2: {line}", file=sys.stderr, flush=True)


def _print(plan: Plan) -> None:
    profile = plan.chosen.option.profile
    table = Table(
        *(
            "option",
            "TTFT p50, p99, s",
            "TBT p50, p99, ms",
            "memory of a rank, GiB",
            "sent by a rank, GB",
            "why not",
        ),
        title=f"on {profile.name} ({profile.source}), simulated",
    )
    for verdict in plan.verdicts[:SHOWN]:
        table.add_row(*_cells(verdict))
    console = Console()
    console.print(table)
    if (left := len(plan.verdicts) - SHOWN) > 0:
        console.print(f"{left} more options are worse or do not fit; --json has all")
    console.print(why(plan))


def _cells(verdict: Verdict) -> list[str]:
    memory, result = verdict.option.memory, verdict.result
    used = f"{(memory.weights + memory.activations + memory.kv_needed) / 2**30:.1f}"
    if result is None:
        return [verdict.name, "-", "-", used, "-", verdict.why_not]
    ttft, tbt = result["ttft_ms"], result["tbt_ms"]
    return [
        verdict.name,
        f"{ttft['p50'] / 1e3:,.2f}, {ttft['p99'] / 1e3:,.2f}",
        f"{tbt['p50']:,.1f}, {tbt['p99']:,.1f}" if tbt else "-",
        used,
        f"{result['bytes_sent_per_rank'] / 1e9:,.1f}",
        verdict.why_not or "chosen",
    ]
