"""Attention on one CPU thread: ours against torch's SDPA, side by side in one run.

    OMP_NUM_THREADS=1 python -m benchmarks.attend [--heads 9] [--kv-heads 3] [--prefill 4096] [--decode 4096]

Knows ops only. Prefill is causal and counts the flops below the diagonal; decode counts the bytes of K and V.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_sps2.ops import blocked
from megatron_sps2.ops.attend import attend


def seconds(*runs: Callable[[], object], budget: float) -> list[float]:
    """The best time of each, taken in turns so that a busy machine slows all alike.

    One thread: its own CPU time, which other processes disturb least. More: the wall clock.
    """
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    best = [float("inf")] * len(runs)
    for run in runs:
        run()
    deadline, num_rounds = clock() + budget, 0
    while clock() < deadline or num_rounds < 2:
        for i, run in enumerate(runs):
            start = clock()
            run()
            best[i] = min(best[i], clock() - start)
        num_rounds += 1
    return best


def sdpa(qkv: list[Tensor], causal: bool) -> Tensor:
    """q, k, v `[1, n, s, d]` -> `[1, n, s, d]`: torch's flash attention, which also gives the lse."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*qkv, 0.0, causal)[0]


def attend_with_fp32_scores(qkv: list[Tensor], diagonal: int | None) -> object:
    """Ours as it is where bf16 matmuls are slow: beside it stands what shifted scores gain."""
    many, blocked.MANY_KEYS = blocked.MANY_KEYS, sys.maxsize
    try:
        return attend(*qkv, scale=0.125, diagonal=diagonal)
    finally:
        blocked.MANY_KEYS = many


def make(num_queries: int, num_keys: int, heads: int, kv_heads: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v as `[n, s, d]` storage, so that a KV head is a run of memory as in the cache."""
    shapes = ((heads, num_queries), (kv_heads, num_keys), (kv_heads, num_keys))
    return [torch.randn(n, s, 64).to(dtype) for n, s in shapes]


def compare(num_queries: int, num_keys: int, args: argparse.Namespace, dtype: torch.dtype) -> None:
    """One line: time and rate of SDPA, of ours, and their ratio."""
    q, k, v = make(num_queries, num_keys, args.heads, args.kv_heads, dtype)
    ours = [x.transpose(0, 1).unsqueeze(1) for x in (q, k, v)]
    # Heads are repeated before the clock starts: SDPA would do it inside, at some cost.
    theirs = [x.repeat_interleave(args.heads // len(x), dim=0).unsqueeze(0) for x in (q, k, v)]
    prefill = num_queries > 1
    diagonal = 0 if prefill else None
    slow, fp32_scores, fast = seconds(
        lambda: sdpa(theirs, prefill),
        lambda: attend_with_fp32_scores(ours, diagonal),
        lambda: attend(*ours, scale=0.125, diagonal=diagonal),
        budget=args.budget,
    )
    work = 2 * args.heads * num_queries * num_keys * 64 if prefill else (k.nbytes + v.nbytes)
    name, unit = ("prefill", "GFLOP/s") if prefill else ("decode", "GB/s")
    print(
        f"{name:8s}{num_keys:7d} {str(dtype)[6:]:9s} | SDPA {slow * 1e3:9.2f} ms"
        f" {work / slow / 1e9:6.1f} {unit:7s}"
        f" | ours {fast * 1e3:9.2f} ms {work / fast / 1e9:6.1f} {unit:7s} | {slow / fast:5.2f}x"
        f" | with fp32 scores {fp32_scores * 1e3:9.2f} ms",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--heads", type=int, default=9)
    parser.add_argument("--kv-heads", type=int, default=3)
    parser.add_argument("--prefill", type=int, nargs="*", default=[2048, 4096, 8192, 16384])
    parser.add_argument("--decode", type=int, nargs="*", default=[4096, 16384, 32768])
    parser.add_argument(
        "--budget", type=float, default=1.0, help="seconds for each line, two rounds at least"
    )
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread, {args.heads}/{args.kv_heads} heads")
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for num_tokens in args.prefill:
            compare(num_tokens, num_tokens, args, dtype)
        for num_tokens in args.decode:
            compare(1, num_tokens, args, dtype)


if __name__ == "__main__":
    main()
