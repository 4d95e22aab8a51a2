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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.simulated_map import GPUS, LENGTHS, MAPPED, mapped
from benchmarks.simulated_mix import K, capacity, deployment, trace
from benchmarks.simulated_plots import draw_map, draw_ratios
from megatron_sps2.bench.ratios import PAPER
from megatron_sps2.config import ParallelConfig
from megatron_sps2.simulator.shapes import SHAPES

RATIOS = ("ttft_ms", "tbt_ms", "e2e_ms")
# What is called here as bench/ratios.py calls it.
NAMES = {
    **{name: name.removesuffix("_ms") for name in RATIOS},
    **{name: f"{name}_throughput" for name in ("prefill", "decode")},
}


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


# Model, sp, tp, longest: on every profile; and once, 405B where its weights fit 8 GPUs in bfloat16.
EVERYWHERE = (
    ("llama3-8b", 8, 1, 32 * K),
    ("llama3-8b", 8, 1, 128 * K),
    ("llama3-70b", 4, 8, 128 * K),
)
ONCE = {
    "h100": (("llama3-8b", 32, 1, 1024 * K), ("llama3-70b", 16, 8, 512 * K)),
    "h200": (("llama3-405b", 16, 8, 256 * K),),
}


def scenarios(profiles: Sequence[str]) -> list[Scenario]:
    return [
        Scenario(profile=profile, model=model, sp=sp, tp=tp, longest=longest)
        for profile in profiles
        for model, sp, tp, longest in (*EVERYWHERE, *ONCE.get(profile, ()))
    ]


# Chunks of 512 were the slowest of all in response time wherever they were tried.
SETTINGS = ("sps2-csa", "sps2-exact", "fcfs", "sarathi-2048", "sarathi-8192")
LOADS = (0.3, 0.6, 0.9)


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
                    name: ratios(found[name], best) for name in SETTINGS if "sarathi" not in name
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
        paper = {name: PAPER[theirs] for name, theirs in NAMES.items()}
        draw_ratios(compared, paper, args.figures / "simulated_ratios.png")
    if cells:
        draw_map(cells, args.figures / "simulated_map.png")
    found = {"simulated": True, "source": "data sheet, not measured", "compared": compared, "map": cells}
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if not args.only:
        small = json.dumps(found | {"compared": [_ratios_alone(each) for each in compared]})
        (args.figures / "simulated_clusters.json").write_text(small + "\n", encoding="utf-8")


def _ratios_alone(compared: dict[str, Any]) -> dict[str, Any]:
    """Without the settings' own numbers, for a small file."""
    kept = [{name: row[name] for name in ("load", "ratios_to_sarathi")} for row in compared["rows"]]
    return compared | {"rows": kept}


def _compare_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for scenario in filter(_fits, scenarios(args.profiles)):
        _tell(scenario.name)
        found.append(compare(scenario, args.num_requests))
    return found


def _map_all(args: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for (name, profile), num_gpus, longest in itertools.product(MAPPED.items(), GPUS, LENGTHS):
        _tell(f"map: {name}, {num_gpus} {profile}, {longest // K}K")
        found.append(mapped(profile, name, num_gpus, longest, args.map_requests, args.load))
    return found


def _fits(scenario: Scenario) -> bool:
    model, grid = SHAPES[scenario.model], ParallelConfig(sp_size=scenario.sp, tp_size=scenario.tp)
    option = deployment(scenario.profile, model, grid, "sps2-exact", scenario.longest)
    if not option.memory.fits:
        _tell(f"{scenario.name}: does not fit, {option.memory}")
    return option.memory.fits


if __name__ == "__main__":
    main()
