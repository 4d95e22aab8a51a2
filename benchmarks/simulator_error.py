"""The simulator held against this machine: a profile, then two traces through the real engine and simulated.

python -m benchmarks.simulator_error --json OUT. The engine runs each trace at every --sp; the profile is
fitted to a walk over lengths and batches and to the first trace. The second one is held out.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.side_by_side import random_llama
from checkpoints_tools.convert import convert
from megatron_sps2.config import DType, ModelConfig, ParallelConfig, ScheduleConfig
from megatron_sps2.engine.build import EngineConfig, build_engine
from megatron_sps2.model.manifest import load_model_config
from megatron_sps2.simulator.arrivals import Arrival
from megatron_sps2.simulator.cost import CostModel
from megatron_sps2.simulator.counter import Counter
from megatron_sps2.simulator.fit import Observation, as_profile, columns, fit
from megatron_sps2.simulator.measure import StepLog, replay, walk
from megatron_sps2.simulator.outcome import Served, summary
from megatron_sps2.simulator.profile import DeviceProfile
from megatron_sps2.simulator.replica import Setup
from megatron_sps2.simulator.simulation import simulate

LONGEST = 6144
MAX_NUM_SEQS = 16
GOAL = 0.2
COMPARED = (("ttft_ms", "p50"), ("ttft_ms", "p99"), ("tbt_ms", "p50"), ("tbt_ms", "p99"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Lengths of a trace: (share, least, most) of prompts, and (least, most) of answers."""

    name: str
    prompts: tuple[tuple[float, int, int], ...]
    answers: tuple[int, int]
    seed: int

    def trace(self, num_requests: int, rate: float) -> list[Arrival]:
        rng = np.random.default_rng(self.seed)
        arrivals = np.cumsum(rng.exponential(1 / rate, num_requests))
        shares = [share for share, _, _ in self.prompts]
        found = []
        for arrival in arrivals - arrivals[0]:
            _, least, most = self.prompts[rng.choice(len(shares), p=shares)]
            found.append(
                Arrival(
                    arrival_s=float(arrival),
                    num_prompt_tokens=int(rng.integers(least, most)),
                    num_output_tokens=int(rng.integers(*self.answers)),
                )
            )
        return found


MIXES = (
    Mix(name="calibration", prompts=((0.8, 64, 700), (0.2, 1000, 4000)), answers=(16, 64), seed=1),
    Mix(name="held out", prompts=((0.5, 100, 1500), (0.5, 1500, 5500)), answers=(8, 48), seed=2),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What the ranks and the simulator are both told."""

    checkpoint: str
    model: ModelConfig
    parallel: ParallelConfig
    dtype: DType
    schedule: ScheduleConfig

    @property
    def engine(self) -> EngineConfig:
        return EngineConfig(
            checkpoint=self.checkpoint,
            parallel=self.parallel,
            dtype=self.dtype,
            max_model_len=LONGEST,
            schedule=self.schedule,
        )

    @property
    def setup(self) -> Setup:
        return Setup(
            model=self.model, parallel=self.parallel, schedule=self.schedule, cache=self.engine.sized_cache()
        )

    @property
    def counter(self) -> Counter:
        return Counter(
            model=self.model,
            parallel=self.parallel,
            dtype=self.dtype,
            devices_per_node=self.parallel.world_size,
        )

    def cost(self, observations: Sequence[Observation]) -> CostModel:
        return CostModel(profile=self.profile(observations), counter=self.counter)

    def profile(self, observations: Sequence[Observation]) -> DeviceProfile:
        return as_profile(
            fit(observations, self.parallel.world_size),
            name="here",
            source="measured by benchmarks.simulator_error",
            dtype=self.dtype,
            memory_bytes=1,
            devices_per_node=self.parallel.world_size,
            notes={"sp": self.parallel.sp_size, "tp": self.parallel.tp_size},
        )


class Ranks:
    """The engine on processes of its own; jobs go to its first rank."""

    def __init__(self, case: Case) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "megatron_sps2.engine.build"])
        self._folder = tempfile.TemporaryDirectory()
        self._pipe, far = context.Pipe()
        self._ranks = [
            context.Process(target=_rank, args=(rank, case, f"{self._folder.name}/store", far), daemon=True)
            for rank in range(case.parallel.world_size)
        ]
        for rank in self._ranks:
            rank.start()

    def walk(self, seconds: float) -> list[Observation]:
        self._pipe.send(seconds)
        return self._pipe.recv()

    def replay(self, trace: Sequence[Arrival]) -> tuple[list[Served], list[Observation]]:
        self._pipe.send(trace)
        return self._pipe.recv()

    def close(self) -> None:
        self._pipe.send(None)
        for rank in self._ranks:
            rank.join(20)
            rank.kill()
        self._folder.cleanup()


def _rank(rank: int, case: Case, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=case.parallel.world_size
    )
    engine = build_engine(case.engine)
    if not engine.is_leader:
        engine.follow()
        return
    while (job := pipe.recv()) is not None:
        log = StepLog(case.counter)
        if isinstance(job, float):
            walk(engine, log, LONGEST - 512, job)
            pipe.send(log.observations())
        else:
            pipe.send((replay(engine, job, log), log.observations()))
    engine.stop()


def fitting_rate(case: Case, mix: Mix, cost: CostModel, num_requests: int, load: float) -> float:
    """Requests per second that keep the ranks busy for `load` of the time, as simulated."""
    trace = mix.trace(num_requests, 1e6)
    busy = sum(simulate(case.setup, cost, trace).busy_s)
    return load * num_requests / busy


def run_case(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Traces take turns, so that a slow minute of the machine falls on both."""
    ranks = Ranks(case)
    try:
        observations = ranks.walk(args.budget_s)
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
                served, steps = ranks.replay(trace)
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
    return {
        "sp": case.parallel.sp_size,
        "policy": case.schedule.policy,
        "profile": asdict(cost.profile),
        "rows": rows,
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
            run_case(_case(checkpoint, sp_size, policy, args.dtype), args)
            for sp_size in args.sp
            for policy in args.policies
        ]
    rows = [row for each in found for row in each["rows"]]
    print_table(rows)
    within = sum(abs(row["error"]) <= GOAL for row in rows)
    print(f"{within} of {len(rows)} within {GOAL:.0%}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _case(checkpoint: str, sp_size: int, policy: Any, dtype: DType) -> Case:
    return Case(
        checkpoint=checkpoint,
        model=load_model_config(checkpoint),
        parallel=ParallelConfig(sp_size=sp_size),
        dtype=dtype,
        schedule=ScheduleConfig(
            policy=policy,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=512 if policy == "sarathi" else 2048,
            short_prompt_tokens=512,
        ),
    )


if __name__ == "__main__":
    main()
