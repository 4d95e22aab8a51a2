"""A trace's requests as the simulator's flags ask for them, and where results go. Sends nothing."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_sps2.bench.arrivals import ArrivalConfig, arrival_times
from megatron_sps2.bench.trace import BLOCK_TOKENS, Planned, read_trace
from megatron_sps2.bench.workload import WorkloadConfig, scaled
from megatron_sps2.simulator.arrivals import Arrival

STDOUT = "-"


def read_planned(args: argparse.Namespace, max_model_len: int | None) -> list[Arrival]:
    """Scaled and clipped as `sps2 bench` does it. Raises ValueError or OSError."""
    planned = read_trace(args.trace, args.trace_format, args.num_requests, args.seed)
    config = WorkloadConfig(
        time_scale=args.time_scale,
        length_scale=args.length_scale,
        max_model_len=max_model_len,
        seed=args.seed,
    )
    found = [_arrival(each, BLOCK_TOKENS * args.length_scale) for each in scaled(planned, config)]
    if args.request_rate is None:
        return found
    arrivals = ArrivalConfig(kind="poisson", request_rate=args.request_rate, seed=args.seed)
    times = arrival_times(arrivals, [each.arrival_s for each in found])
    return [replace(each, arrival_s=time) for each, time in zip(found, times, strict=True)]


def _arrival(one: Planned, block_tokens: float) -> Arrival:
    return Arrival(
        arrival_s=one.arrival_s,
        num_prompt_tokens=one.num_prompt_tokens,
        num_output_tokens=one.num_output_tokens,
        hash_ids=one.hash_ids,
        block_tokens=block_tokens,
    )


def longest_of(planned: Sequence[Arrival]) -> int:
    return max(each.num_prompt_tokens + each.num_output_tokens for each in planned)


def write(target: str | None, found: dict[str, Any]) -> None:
    text = json.dumps(found, indent=1) + "\n"
    if target == STDOUT:
        sys.stdout.write(text)
    elif target is not None:
        Path(target).write_text(text, encoding="utf-8")
