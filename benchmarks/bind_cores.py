"""Ranks on cores of their own beside ranks that the system moves about, taking turns in one run.

python -m benchmarks.bind_cores CHECKPOINT [--tokens 4096] [--rounds 5] [--sp 2]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

FLAGS = ("--bind-cores", "--no-bind-cores")
NUM_GENERATED = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sp", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ids = Path(folder) / "ids.json"
        ids.write_text(json.dumps([5 + i * 7 % 1000 for i in range(args.tokens)]))
        rounds = [{flag: _answer(args, ids, flag) for flag in FLAGS} for _ in range(args.rounds)]
    for name, value in (("TTFT", _ttft), ("TBT p50", _tbt)):
        bound, free = ([value(each[flag]) for each in rounds] for flag in FLAGS)
        ratios = [b / a for a, b in zip(bound, free, strict=True)]
        print(
            f"{name}: bound {median(bound):,.1f} ms, unbound {median(free):,.1f} ms; unbound/bound by round: "
            f"median {median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}"
        )


def _answer(args: argparse.Namespace, ids: Path, flag: str) -> dict[str, Any]:
    command = (*(sys.executable, "-m", "megatron_sps2", "generate", "--checkpoint", args.checkpoint), flag)
    sizes = ("--sp", str(args.sp), "--prompt-ids", str(ids), "--max-tokens", str(NUM_GENERATED))
    done = subprocess.run(
        (*command, *sizes, "--ignore-eos", "--json"), check=True, capture_output=True, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _ttft(answer: dict[str, Any]) -> float:
    return float(answer["ttft_ms"])


def _tbt(answer: dict[str, Any]) -> float:
    return float(answer["tbt_ms"]["p50"])


if __name__ == "__main__":
    main()
