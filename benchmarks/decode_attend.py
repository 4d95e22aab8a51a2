"""Decode attention over a paged cache on one CPU thread: the torch set beside the Numba set, in one run.

    OMP_NUM_THREADS=1 python -m benchmarks.decode_attend [--rows 1 8] [--contexts 4096 32768]

Rates are bytes of K and V over the time; beside them stands torch's sum of a tensor of as many bytes. A row's
blocks lie one after another, as a prompt gets them; --interleaved: between those of the others, as answers do
that grow side by side for long.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.attend import seconds
from megatron_sps2.attention.huge_pages import prefer_huge_pages
from megatron_sps2.ops.kernel_set import TORCH, numba_kernels
from megatron_sps2.ops.paged import PagedKV, PagedRows
from megatron_sps2.ops.quantized import quantize

BLOCK_SIZE = 64
STORED = {"bfloat16": torch.bfloat16, "float32": torch.float32, "fp8": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 32768])
    parser.add_argument(
        "--heads", type=int, nargs="+", default=[8, 4, 64], help="query heads, KV heads, size"
    )
    parser.add_argument("--stored", nargs="+", default=[*STORED], choices=STORED)
    parser.add_argument("--interleaved", action="store_true")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds of each line")
    args = parser.parse_args()
    columns = "stored", "rows", "context", "torch, ms", "numba, ms", "numba", "of reading", "ratio"
    print("|", " | ".join(columns), "|")
    print("|" + "---|" * len(columns))
    for stored in args.stored:
        for num_rows in args.rows:
            for context in args.contexts:
                print("|", " | ".join(_line(stored, num_rows, context, args)), "|", flush=True)


def _line(stored: str, num_rows: int, context: int, args: argparse.Namespace) -> Iterator[str]:
    num_heads, num_kv_heads, dim = args.heads
    rows = _rows(num_rows, context, args.interleaved)
    kv = _pages(stored, num_rows * len(rows.tables[0]) * BLOCK_SIZE, num_kv_heads, dim)
    q = torch.randn(num_rows, num_heads, dim).to(STORED[stored])
    num_bytes = sum(part.nbytes for part in kv.parts)
    read, kernels = torch.ones(num_bytes // 8, dtype=torch.int64), numba_kernels()
    torch_s, numba_s, read_s = seconds(
        lambda: TORCH.attend_paged(q, kv, rows, scale=dim**-0.5),
        lambda: kernels.attend_paged(q, kv, rows, scale=dim**-0.5),
        lambda: read.sum(),
        budget=args.budget,
    )
    yield from (stored, f"{num_rows}", f"{context}", f"{1e3 * torch_s:.2f}", f"{1e3 * numba_s:.2f}")
    yield from (
        f"{num_bytes / numba_s / 1e9:.1f} GB/s",
        f"{read_s / numba_s:.0%}",
        f"{torch_s / numba_s:.2f}x",
    )


def _rows(num_rows: int, context: int, interleaved: bool) -> PagedRows:
    num_blocks = -(-context // BLOCK_SIZE)
    blocks = torch.arange(num_rows * num_blocks)
    tables = (
        blocks.view(num_blocks, num_rows).T if interleaved else blocks.view(num_rows, num_blocks)
    ).tolist()
    return PagedRows(tables, [0] * num_rows, [context] * num_rows, BLOCK_SIZE)


def _pages(stored: str, num_slots: int, num_kv_heads: int, dim: int) -> PagedKV:
    keys, values = (torch.randn(num_kv_heads, num_slots, dim) for _ in "kv")
    if stored == "fp8":
        (keys, key_scales), (values, value_scales) = map(quantize, (keys, values))
        parts = [_as_in_a_cache(x) for x in (keys, values, key_scales, value_scales)]
        return PagedKV(parts[0], parts[1], BLOCK_SIZE, parts[2], parts[3])
    keys, values = (_as_in_a_cache(x.to(STORED[stored])) for x in (keys, values))
    return PagedKV(keys, values, BLOCK_SIZE)


def _as_in_a_cache(x: Tensor) -> Tensor:
    """A copy in large pages, where there are any."""
    copy = torch.empty_like(x)
    prefer_huge_pages(copy)
    return copy.copy_(x)


if __name__ == "__main__":
    main()
