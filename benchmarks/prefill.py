"""Time to first token beside transformers' generate: python -m benchmarks.prefill

Each line is the median over rounds in which both take turns, on one random 8-layer Llama.
"""

from __future__ import annotations

import argparse
import statistics

from benchmarks.side_by_side import pair, prompt, run_transformers
from megatron_sps2.config import ParallelConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--sp", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    print("| dtype | tokens | transformers, s | ours, s | ratio | same token | KV tokens per rank |")
    print("|---|---|---|---|---|---|---|")
    for dtype in args.dtypes:
        with pair(dtype, ParallelConfig(sp_size=args.sp), max(args.lengths) + 64) as (hf, ours):
            for length in args.lengths:
                ids = prompt(length)
                theirs, mine = [], []
                for _ in range(args.rounds):
                    times, token = run_transformers(hf, ids, 1)
                    theirs.append(times.ttft)
                    answer = ours.run(ids, 1)
                    mine.append(answer.times.ttft)
                a, b = statistics.median(theirs), statistics.median(mine)
                same = token == answer.tokens
                cells = [dtype, length, f"{a:.2f}", f"{b:.2f}", f"{a / b:.2f}x", same, answer.held]
                print("|", " | ".join(map(str, cells)), "|", flush=True)


if __name__ == "__main__":
    main()
