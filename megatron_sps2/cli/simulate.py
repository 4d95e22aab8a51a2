"""`sps2 simulate`: a trace on a simulated cluster, as a table and JSON."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_sps2.cli.planned import STDOUT, longest_of, read_planned, write
from megatron_sps2.cli.serve_arguments import schedule_config
from megatron_sps2.config import ParallelConfig
from megatron_sps2.csa_setting import load_setting
from megatron_sps2.simulator.arrivals import Arrival
from megatron_sps2.simulator.data_sheets import load_profile
from megatron_sps2.simulator.deployment import Deployment
from megatron_sps2.simulator.setting import Setting
from megatron_sps2.simulator.shapes import load_shape


def run(args: argparse.Namespace) -> int:
    deployment, planned = _read(args)
    found = facts(args, deployment) | deployment.run(planned).to_json()
    write(args.json, found)
    if args.json != STDOUT:
        title = f"{args.model} on {deployment.profile.name} ({deployment.profile.source}), simulated"
        print_summary(found, title)
    return 0


def _read(args: argparse.Namespace) -> tuple[Deployment, list[Arrival]]:
    model = load_shape(args.model)
    parallel = ParallelConfig(dp_size=args.dp, sp_size=args.sp, tp_size=args.tp)
    parallel.check_model(model)
    csa = load_setting(args.csa_setting)
    if args.attention != "exact":
        csa.check_model(model, "")
        if args.policy == "sarathi":
            raise ValueError(
                f"--attention {args.attention} needs whole prompts and --policy sarathi cuts them; "
                "use --attention exact, or another policy"
            )
    planned = read_planned(args, args.max_model_len or model.max_seq_len)
    schedule = schedule_config(args)
    deployment = Deployment(
        model=model,
        profile=load_profile(args.profile),
        parallel=parallel,
        setting=Setting(
            name=args.policy,
            policy=args.policy,
            chunk=schedule.max_num_batched_tokens,
            attention=args.attention,
        ),
        longest=args.max_model_len or longest_of(planned),
        dtype=args.dtype,
        kv_cache_dtype=args.kv_cache_dtype,
        max_num_seqs=args.max_num_seqs,
        csa=csa,
        csa_beyond=args.csa_density,
        schedule=schedule,
        num_blocks=args.num_kv_blocks,
    )
    return deployment, planned


def facts(args: argparse.Namespace, deployment: Deployment) -> dict[str, Any]:
    """What was asked, first in the JSON."""
    asked = (
        *("model", "dtype", "kv_cache_dtype", "sp", "tp", "dp", "policy", "attention"),
        *("trace", "trace_format", "seed"),
    )
    profile = deployment.profile
    return {
        "simulated": True,
        "profile": profile.name,
        "profile_source": profile.source,
        **{name: getattr(args, name) for name in asked},
        "time_scale": args.time_scale,
        "length_scale": args.length_scale,
        "max_model_len": deployment.longest,
    }


def print_summary(found: dict[str, Any], title: str) -> None:
    columns = ("mean", "p50", "p90", "p99", "max")
    table = Table("", *columns, title=title)
    for name in ("ttft_ms", "tbt_ms", "e2e_ms"):
        cells = [f"{found[name][column]:,.1f}" if found[name] else "-" for column in columns]
        table.add_row(f"{name.removesuffix('_ms').upper()}, ms", *cells)
    console = Console()
    console.print(table)
    console.print(
        f"{found['completed']} requests, {found['failed']} failed; "
        f"{found['prefill_throughput']:,.0f} prompt and {found['decode_throughput']:,.0f} answer tokens/s "
        f"over {found['duration_s']:,.1f} s"
    )
