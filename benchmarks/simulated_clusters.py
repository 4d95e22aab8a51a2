"""What this machine cannot run, simulated from data sheets: 8 to 1,024 GPUs, 8B to 405B, prompts to 1M.

python -m benchmarks.simulated_clusters --json OUT --figures DIR. First the paper's comparison: sps2-csa and
sps2-exact against sarathi on the same ranks under one trace. Then a map: which layout and attention answers
soonest where. Nothing here was measured on a GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.simulated_plots import draw_map, draw_ratios
from megatron_sps2.config import ModelConfig, ParallelConfig, divisors
from megatron_sps2.engine.plan import PrefillPiece, StepPlan
from megatron_sps2.simulator.arrivals import Arrival
from megatron_sps2.simulator.data_sheets import load_profile
from megatron_sps2.simulator.deployment import Deployment
from megatron_sps2.simulator.setting import Setting
from megatron_sps2.simulator.shapes import SHAPES

K = 1024
ANSWER = (64, 256)
SHORT = (128, 2048)
LONG_SHARE = 0.3
RATIOS = ("ttft_ms", "tbt_ms", "e2e_ms")
PAPER = {"ttft_ms": 7.5, "tbt_ms": 1.92, "e2e_ms": 9.8, "prefill": 8.2, "decode": 5.2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """The paper's comparison on one grid of one kind of GPU."""

    profile: str
    model: str
    sp: int
    tp: int
    longest: int

    @property
    def name(self) -> str:
        count = self.sp * self.tp
        return f"{self.model}, {self.longest // K}K, {count} {self.profile} (sp {self.sp}, tp {self.tp})"


# (model, sp, tp, longest): on every profile, and on the first one only.
EVERYWHERE = (
    ("llama3-8b", 8, 1, 32 * K),
    ("llama3-8b", 8, 1, 128 * K),
    ("llama3-70b", 4, 8, 128 * K),
)
ONCE = (
    ("llama3-8b", 32, 1, 1024 * K),
    ("llama3-70b", 16, 8, 512 * K),
    ("llama3-405b", 16, 8, 256 * K),
)


def scenarios(profiles: Sequence[str]) -> list[Scenario]:
    return [
        Scenario(profile=profile, model=model, sp=sp, tp=tp, longest=longest)
        for number, profile in enumerate(profiles)
        for model, sp, tp, longest in (EVERYWHERE if number else (*EVERYWHERE, *ONCE))
    ]


SETTINGS = ("sps2-csa", "sps2-exact", "sarathi-512", "sarathi-2048")
LOADS = (0.3, 0.6, 0.9)


def trace(longest: int, num_requests: int, rate: float, seed: int = 0) -> list[Arrival]:
    """Poisson arrivals; LONG_SHARE of the prompts are half to all of `longest`, the others short."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, num_requests))
    found = []
    for number in range(num_requests):
        is_long = number % 10 < 10 * LONG_SHARE
        least, most = (longest // 2, longest) if is_long else SHORT
        found.append(
            Arrival(
                arrival_s=float(times[number]),
                num_prompt_tokens=int(rng.integers(least, most)),
                num_output_tokens=int(rng.integers(*ANSWER)),
            )
        )
    return found


def deployment(
    profile: str, model: ModelConfig, parallel: ParallelConfig, setting: str, longest: int
) -> Deployment:
    return Deployment(
        model=model,
        profile=load_profile(profile),
        parallel=parallel,
        setting=Setting.parse(setting),
        longest=longest + ANSWER[1],
        max_num_seqs=64,
    )


def prefill_s(option: Deployment, num_tokens: int) -> float:
    """Of one prompt alone, in one piece or in sarathi's chunks."""
    layers, sp_size, csa = option.model.num_layers, option.parallel.sp_size, option.setting.attention == "csa"
    groups = option.model.num_query_groups // option.parallel.tp_size
    whole = "csa" if csa else "ulysses" if groups % sp_size == 0 else "pass_kv"
    size = option.setting.chunk if option.setting.policy == "sarathi" else num_tokens
    cost, seconds = option.cost, 0.0
    for start in range(0, num_tokens, size):
        piece = PrefillPiece(
            request_id=0,
            start=start,
            stop=min(num_tokens, start + size),
            first_layer=0,
            last_layer=layers,
            strategy="pass_q" if start else whole,
        )
        seconds += cost.seconds(StepPlan(pieces=(piece,)), 0)
    return seconds


def capacity(option: Deployment, longest: int) -> float:
    """Prompts per second of the mix that one replica can prefill, answers aside."""
    mix = trace(longest, 20, 1.0)
    return len(mix) / sum(prefill_s(option, each.num_prompt_tokens) for each in mix)


# The paper's comparison.


def compare(scenario: Scenario, num_requests: int) -> dict[str, Any]:
    """Every setting at loads that are shares of what exact sps2 can prefill on these ranks."""
    model, grid = SHAPES[scenario.model], ParallelConfig(sp_size=scenario.sp, tp_size=scenario.tp)
    build = partial(deployment, scenario.profile, model, grid, longest=scenario.longest)
    top = capacity(build(setting="sps2-exact"), scenario.longest)
    rows = []
    for load in LOADS:
        planned = trace(scenario.longest, num_requests, load * top)
        found = {name: build(setting=name).run(planned).to_json() for name in SETTINGS}
        best = min(
            (found[name] for name in SETTINGS if "sarathi" in name), key=lambda each: each["e2e_ms"]["mean"]
        )
        rows.append(
            {
                "load": load,
                "settings": found,
                "ratios_to_sarathi": {
                    name: ratios(found[name], best) for name in SETTINGS if name.startswith("sps2")
                },
            }
        )
    return {"scenario": scenario.name, "profile": scenario.profile, "rows": rows}


def ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Above 1 is better; against sarathi with the better chunk size."""
    found = {
        f"{name}_{rank}": theirs[name][rank] / ours[name][rank]
        for name in RATIOS
        for rank in ("mean", "p50", "p99")
    }
    for name in ("prefill", "decode"):
        found[name] = ours[f"{name}_throughput"] / theirs[f"{name}_throughput"]
    return found


# The map.

KINDS = ("chunked", "SP", "TP+SP", "CSA")
GPUS = (8, 64, 256, 1024)
LENGTHS = (32 * K, 128 * K, 1024 * K)
MAPPED = ("llama3-8b", "llama3-70b", "llama3-405b")


def layouts(model: ModelConfig, num_gpus: int, kind: str) -> Iterator[ParallelConfig]:
    """One replica each; what is left of the GPUs are more replicas."""
    for tp_size in divisors(model.num_attention_heads, model.num_query_groups, 8):
        for sp_size in (2**i for i in range(8)):
            is_kind = {"SP": tp_size == 1, "TP+SP": tp_size > 1 and sp_size > 1}.get(kind, True)
            if is_kind and sp_size * tp_size <= num_gpus:
                yield ParallelConfig(sp_size=sp_size, tp_size=tp_size)


def mapped(
    profile: str, name: str, num_gpus: int, longest: int, num_requests: int, load: float
) -> dict[str, Any]:
    """Each kind's best layout under one load of the whole cluster: the same requests for everybody."""
    model = SHAPES[name]
    one = deployment(profile, model, ParallelConfig(tp_size=8), "sps2-exact", longest)
    rate = load * capacity(one, longest) * num_gpus / 8
    found = {}
    for kind in KINDS:
        tried = [
            _loaded(profile, model, kind, grid, num_gpus, longest, rate, num_requests)
            for grid in _best(profile, model, kind, num_gpus, longest, rate)
        ]
        found[kind] = min(tried, key=lambda each: each["e2e_s"]) if tried else None
    able = {kind: each for kind, each in found.items() if each}
    winner = min(able, key=lambda kind: able[kind]["e2e_s"]) if able else None
    exact = min((k for k in able if k != "CSA"), key=lambda kind: able[kind]["e2e_s"], default=None)
    return {
        "model": name,
        "num_gpus": num_gpus,
        "longest": longest,
        "kinds": found,
        "winner": winner,
        "winner_exact": exact,
    }


def _best(
    profile: str, model: ModelConfig, kind: str, num_gpus: int, longest: int, rate: float
) -> list[ParallelConfig]:
    """The two layouts with the least estimated time: a prefill, and its queue as of one server at random."""
    ranked = []
    for grid in layouts(model, num_gpus, kind):
        option = deployment(profile, model, grid, _setting(kind), longest)
        if option.memory.fits:
            replicas = num_gpus // grid.world_size
            busy = rate / replicas / capacity(option, longest)
            queue = busy / (1 - busy) if busy < 1 else 10 * busy
            ranked.append((prefill_s(option, longest) * (1 + queue), grid.tp_size, grid.sp_size))
    return [ParallelConfig(sp_size=sp, tp_size=tp) for _, tp, sp in sorted(ranked)[:2]]


def _setting(kind: str) -> str:
    return {"chunked": "sarathi-2048", "CSA": "sps2-csa"}.get(kind, "sps2-exact")


def _loaded(
    profile: str,
    model: ModelConfig,
    kind: str,
    grid: ParallelConfig,
    num_gpus: int,
    longest: int,
    rate: float,
    num_requests: int,
) -> dict[str, Any]:
    """One replica under its share of the load."""
    replicas = num_gpus // grid.world_size
    option = deployment(profile, model, grid, _setting(kind), longest)
    result = option.run(trace(longest, num_requests, rate / replicas)).to_json()
    return {
        "tp": grid.tp_size,
        "sp": grid.sp_size,
        "dp": replicas,
        "e2e_s": result["e2e_ms"]["mean"] / 1e3,
        "ttft_s": result["ttft_ms"]["mean"] / 1e3,
        "tbt_p99_ms": result["tbt_ms"]["p99"],
    }


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def print_ratios(found: Sequence[dict[str, Any]]) -> None:
    names = ("ttft_ms_mean", "tbt_ms_mean", "tbt_ms_p99", "e2e_ms_mean", "prefill", "decode")
    print("| scenario | load | setting |", " | ".join(names), "|")
    print("|" + "---|" * (len(names) + 3))
    for each in found:
        for row in each["rows"]:
            for setting, ratio in row["ratios_to_sarathi"].items():
                cells = " | ".join(f"{ratio[name]:.2f}x" for name in names)
                print(f"| {each['scenario']} | {row['load']} | {setting} | {cells} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figures", type=Path, default=Path("docs/figures"))
    parser.add_argument("--num-requests", type=int, default=20)
    parser.add_argument("--map-requests", type=int, default=10)
    parser.add_argument("--load", type=float, default=0.5, help="of the map")
    parser.add_argument("--only", choices=("ratios", "map"), help="default: both")
    parser.add_argument("--profiles", nargs="+", default=["h100", "h200", "a100"])
    args = parser.parse_args()
    compared = [] if args.only == "map" else _compare_all(args)
    cells = [] if args.only == "ratios" else _map_all(args)
    args.figures.mkdir(parents=True, exist_ok=True)
    if compared:
        print_ratios(compared)
        draw_ratios(compared, PAPER, args.figures / "simulated_ratios.png")
    if cells:
        draw_map(cells, args.profiles[0], args.figures / "simulated_map.png")
    if args.json:
        found = {"simulated": True, "source": "data sheet, not measured", "compared": compared, "map": cells}
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def _compare_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for scenario in filter(_fits, scenarios(args.profiles)):
        _tell(scenario.name)
        found.append(compare(scenario, args.num_requests))
    return found


def _map_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for name, num_gpus, longest in itertools.product(MAPPED, GPUS, LENGTHS):
        _tell(f"map: {name}, {num_gpus} GPUs, {longest // K}K")
        found.append(mapped(args.profiles[0], name, num_gpus, longest, args.map_requests, args.load))
    return found


def _fits(scenario: Scenario) -> bool:
    model, grid = SHAPES[scenario.model], ParallelConfig(sp_size=scenario.sp, tp_size=scenario.tp)
    option = deployment(scenario.profile, model, grid, "sps2-exact", scenario.longest)
    if not option.memory.fits:
        _tell(f"{scenario.name}: does not fit, {option.memory}")
    return option.memory.fits


if __name__ == "__main__":
    main()
