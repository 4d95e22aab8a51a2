"""Time between tokens, and KV memory per rank, beside transformers' generate: python -m benchmarks.decode

Medians over tokens and rounds in which both take turns, on one random 8-layer Llama.
"""

from __future__ import annotations

import argparse
import statistics

from transformers import LlamaForCausalLM

from benchmarks.side_by_side import Ours, pair, prompt, run_transformers
from megatron_sps2.config import ParallelConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--sp", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=33)
    args = parser.parse_args()
    columns = "dtype", "context", "transformers, ms", "ours, ms", "ratio", "same tokens", "KV share of a rank"
    print("|", " | ".join(columns), "|")
    print("|---|---|---|---|---|---|---|")
    for dtype in args.dtypes:
        with pair(dtype, ParallelConfig(sp_size=args.sp), max(args.lengths) + 64) as (hf, ours):
            for length in args.lengths:
                print("|", " | ".join(map(str, _row(dtype, length, hf, ours, args))), "|", flush=True)


def _row(dtype: str, length: int, hf: LlamaForCausalLM, ours: Ours, args: argparse.Namespace) -> list[object]:
    ids, theirs, mine = prompt(length), [], []
    for _ in range(args.rounds):
        times, tokens = run_transformers(hf, ids, args.tokens)
        theirs += times.gaps
        answer = ours.run(ids, args.tokens)
        mine += answer.times.gaps
    a, b = 1e3 * statistics.median(theirs), 1e3 * statistics.median(mine)
    agree = sum(x == y for x, y in zip(tokens, answer.tokens, strict=True))
    share = f"{max(answer.held) / sum(answer.held):.3f} held, {ours.kv_share:.3f} allocated"
    return [dtype, length, f"{a:.1f}", f"{b:.1f}", f"{a / b:.2f}x", f"{agree}/{args.tokens}", share]


if __name__ == "__main__":
    main()
