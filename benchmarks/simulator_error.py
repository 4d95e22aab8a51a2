"""The simulator held against this machine: a profile, then two traces through the real engine and simulated.

python -m benchmarks.simulator_error --json OUT. The engine runs each trace at every --sp; the profile is
fitted to a walk over lengths and batches and to the first trace. The second one is held out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engine_ranks import EngineRanks
from benchmarks.side_by_side import random_llama
from benchmarks.simulator_case import LONGEST, MIXES, Case, Mix, case_of
from checkpoints_tools.convert import convert
from megatron_sps2.engine.engine import Engine
from megatron_sps2.simulator.cost import CostModel
from megatron_sps2.simulator.counter import Counter
from megatron_sps2.simulator.fit import Observation, columns
from megatron_sps2.simulator.measure import StepLog, replay, walk
from megatron_sps2.simulator.outcome import Served, summary
from megatron_sps2.simulator.simulation import simulate

GOAL = 0.2
COMPARED = (("ttft_ms", "p50"), ("ttft_ms", "p99"), ("tbt_ms", "p50"), ("tbt_ms", "p99"))


def _program(engine: Engine, pipe: Connection, counter: Counter) -> None:
    """Seconds to walk for, or a trace -> what was served, and the steps."""
    if not engine.is_leader:
        engine.follow()
        return
    while (job := pipe.recv()) is not None:
        log, served = StepLog(counter), list[Served]()
        if isinstance(job, float):
            walk(engine, log, LONGEST - 512, job)
        else:
            served = replay(engine, job, log)
        pipe.send((served, log.observations()))
    engine.stop()


def fitting_rate(case: Case, mix: Mix, cost: CostModel, num_requests: int, load: float) -> float:
    """Requests per second that keep the ranks busy for `load` of the time, as simulated."""
    trace = mix.trace(num_requests, 1e6)
    busy = sum(simulate(case.setup, cost, trace).busy_s)
    return load * num_requests / busy


def run_case(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Traces take turns, so that a slow minute of the machine falls on both."""
    ranks = EngineRanks(case.engine, partial(_program, counter=case.counter))
    try:
        _, observations = ranks.ask(args.budget_s)
        first = case.cost(observations)
        tell(f"sp {case.parallel.sp_size}: {first.profile.notes['fit']}")
        traces = {
            mix.name: mix.trace(
                args.num_requests, fitting_rate(case, mix, first, args.num_requests, args.load)
            )
            for mix in MIXES
        }
        real: dict[str, list[list[Served]]] = {name: [] for name in traces}
        for _ in range(args.rounds):
            for name, trace in traces.items():
                served, steps = ranks.ask(trace)
                tell(f"sp {case.parallel.sp_size}, {name}: {summary(served)['duration_s']:.0f} s")
                real[name].append(served)
                observations += steps if name == MIXES[0].name else []
    finally:
        ranks.close()
    cost = case.cost(observations)
    rows = []
    for name, trace in traces.items():
        simulated = simulate(case.setup, cost, trace).to_json()
        measured = [summary(each) for each in real[name]]
        rows += compare(case, name, simulated, measured)
    found = {
        "sp": case.parallel.sp_size,
        "policy": case.schedule.policy,
        "profile": asdict(cost.profile),
        "rows": rows,
    }
    return found | (_whole(real, observations) if args.whole else {})


def _whole(real: dict[str, list[list[Served]]], observations: Sequence[Observation]) -> dict[str, Any]:
    """Every request and step: megabytes."""
    return {
        "real": {name: [[asdict(each) for each in run] for run in runs] for name, runs in real.items()},
        "steps": [(columns(each.work), each.seconds) for each in observations],
    }


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def compare(
    case: Case, trace: str, simulated: dict[str, Any], measured: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Against the median of the rounds; beside it how far rounds of the same trace lie apart."""
    rows = []
    for name, rank in COMPARED:
        values = [each[name][rank] for each in measured]
        real = float(np.median(values))
        rows.append(
            {
                "policy": case.schedule.policy,
                "sp": case.parallel.sp_size,
                "trace": trace,
                "metric": f"{name.removesuffix('_ms').upper()} {rank}, ms",
                "real": real,
                "simulated": simulated[name][rank],
                "error": simulated[name][rank] / real - 1,
                "rounds apart": max(values) / min(values) - 1,
            }
        )
    return rows


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    print("|", " | ".join(rows[0]), "|")
    print("|" + "---|" * len(rows[0]))
    for each in rows:
        shown = {key: f"{value:.1f}" if isinstance(value, float) else value for key, value in each.items()}
        shown |= {key: f"{each[key]:+.1%}" for key in ("error", "rounds apart")}
        print("|", " | ".join(map(str, shown.values())), "|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", help="default: the random 56M Llama")
    parser.add_argument("--sp", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--policies", nargs="+", default=["sps2"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--num-requests", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--load", type=float, default=0.5, help="share of the time that the ranks are busy")
    parser.add_argument(
        "--budget-s", type=float, default=60.0, help="seconds to walk over lengths and batches"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--whole", action="store_true", help="every request and step, too, in the JSON")
    args = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint
        if checkpoint is None:
            random_llama().save_pretrained(f"{folder}/hf")
            convert(f"{folder}/hf", f"{folder}/checkpoint")
            checkpoint = f"{folder}/checkpoint"
        found = [
            run_case(case_of(checkpoint, sp_size, policy, args.dtype), args)
            for sp_size in args.sp
            for policy in args.policies
        ]
    rows = [row for each in found for row in each["rows"]]
    print_table(rows)
    within = sum(abs(row["error"]) <= GOAL for row in rows)
    print(f"{within} of {len(rows)} within {GOAL:.0%}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
