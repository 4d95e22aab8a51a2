"""Decode over a paged cache: one query a row, bound by memory."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.case import Bench, Case, Row
from benchmarks.gpu.checks import LIMITS, attended, compare, poisoned
from benchmarks.gpu.kernels import kernel, operation
from benchmarks.gpu.libraries import library_times
from benchmarks.gpu.timing import milliseconds

K = 1024
BLOCK_SIZE = 64
# Rows that are held against fp64; all must be finite.
CHECKED_ROWS = 3


def cases(bench: Bench) -> Iterator[Case]:
    long = bench.pick(full=128 * K, quick=32 * K, tiny=100)
    batches = bench.pick(full=(1, 8, 64), quick=(1, 8), tiny=(1, 2))
    for batch, quantized in itertools.product(batches, (False, True)):
        yield _case(bench, "fp8" if quantized else "equal", [long] * batch, quantized)
    yield _case(bench, "mixed", [max(1, long >> i) for i in range(batches[-1])], quantized=False)


def _case(bench: Bench, name: str, lengths: Sequence[int], quantized: bool) -> Case:
    return Case(name=name, measure=partial(_measure, bench, lengths, quantized))


def _measure(bench: Bench, lengths: Sequence[int], quantized: bool) -> Row:
    attend_paged, rows_type = kernel("decode", "attend_paged"), operation("paged", "PagedRows")
    n, n_kv, d = bench.pick(full=(32, 8, 128), quick=(32, 8, 128), tiny=(4, 2, 16))
    device, dtype, scale = bench.device, torch.bfloat16, d**-0.5
    blocks = [-(-length // BLOCK_SIZE) for length in lengths]
    num_slots, element = sum(blocks) * BLOCK_SIZE, 1 if quantized else 2
    # Beside it, while it is made, one head's numbers in fp32.
    bench.needs(num_slots * d * (2 * element * n_kv + (16 if quantized else 2)), "the cache")
    kv = _cache(bench, n_kv, num_slots, d, quantized)
    # Blocks in no order, as in a cache that has been used for a while.
    order = torch.randperm(sum(blocks)).tolist()
    tables = [order[start : start + count] for start, count in zip(_starts(blocks), blocks, strict=True)]
    rows = rows_type(tables, [0] * len(lengths), list(lengths), BLOCK_SIZE)
    q = torch.randn(len(lengths), n, d, device=device, dtype=dtype)
    with poisoned():
        out, lse = attend_paged(q, kv, rows, scale=scale)
    pairs = []
    for row in sorted({0, len(lengths) // 2, len(lengths) - 1})[:CHECKED_ROWS]:
        wanted = attended(q[row : row + 1], *_numbers(kv, tables[row], lengths[row]), scale, None)
        pairs += [(out[row : row + 1], wanted[0]), (lse[row : row + 1], wanted[1])]
    check = compare((out, lse), pairs, LIMITS[dtype])
    taken = milliseconds(lambda _: attend_paged(q, kv, rows, scale=scale), device)
    token_bytes = 2 * n_kv * (d * element + (4 if quantized else 0))
    return Row(
        shape=f"{len(lengths)} rows of {_spell(lengths)}, {n}/{n_kv} heads of {d}, "
        f"{'fp8' if quantized else 'bf16'}",
        milliseconds=taken,
        rate=sum(lengths) * token_bytes / taken / 1e9,
        unit="TB/s",
        check=check,
        ratios=_beside(bench, q, kv, lengths, scale, taken),
    )


def _cache(bench: Bench, n_kv: int, num_slots: int, d: int, quantized: bool) -> Any:
    """A PagedKV of random numbers."""
    (keys, key_scales), (values, value_scales) = (
        _random(bench, n_kv, num_slots, d, quantized) for _ in range(2)
    )
    return operation("paged", "PagedKV")(keys, values, BLOCK_SIZE, key_scales, value_scales)


def _random(
    bench: Bench, n_kv: int, num_slots: int, d: int, quantized: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Numbers `[n_kv, num_slots, d]` and their scales, if any; quantized head by head, to save memory."""
    if not quantized:
        return torch.randn(n_kv, num_slots, d, device=bench.device, dtype=torch.bfloat16), None
    quantize = operation("quantized", "quantize")
    numbers = torch.empty(n_kv, num_slots, d, device=bench.device, dtype=torch.uint8)
    scales = torch.empty(n_kv, num_slots, device=bench.device)
    for head in range(n_kv):
        own, scales[head] = quantize(torch.randn(num_slots, d, device=bench.device))
        numbers[head] = own.view(torch.uint8)
    return numbers.view(torch.float8_e4m3fn), scales


def _numbers(kv: Any, table: Sequence[int], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What a row's tokens hold: k, v `[s, n_kv, d]`."""
    device = kv.keys.device
    starts = torch.tensor(table, device=device)[:, None] * BLOCK_SIZE
    slots = (starts + torch.arange(BLOCK_SIZE, device=device)).flatten()[:length]

    def taken(numbers: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
        if scales is None:
            return numbers[:, slots].transpose(0, 1)
        # Few operations know float8; bytes are gathered as bytes.
        raw = numbers.view(torch.uint8)[:, slots].view(numbers.dtype)
        return (raw.float() * scales[:, slots, None]).transpose(0, 1)

    return taken(kv.keys, kv.key_scales), taken(kv.values, kv.value_scales)


def _beside(
    bench: Bench, q: torch.Tensor, kv: Any, lengths: Sequence[int], scale: float, taken: float
) -> dict[str, float]:
    """Libraries over contiguous keys of the same number, where rows are equally long and not quantized."""
    if kv.key_scales is not None or len(set(lengths)) > 1:
        return {}
    if bench.device.type == "cuda" and 2 * kv.keys.nbytes > torch.cuda.mem_get_info(bench.device)[0]:
        return {}  # no room for a contiguous copy
    b, length = len(lengths), lengths[0]
    n_kv, d = kv.keys.shape[0], kv.keys.shape[2]
    keys, values = (
        x.view(n_kv, b, -1, d)[:, :, :length].permute(2, 1, 0, 3) for x in (kv.keys, kv.values)
    )  # [s, b, n_kv, d]
    times = library_times(q[None], keys, values, scale, None)
    return {name: other / taken for name, other in times.items()}


def _starts(counts: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(counts)][:-1]


def _spell(lengths: Sequence[int]) -> str:
    return f"{lengths[0]}" if len(set(lengths)) == 1 else f"{max(lengths)} to {min(lengths)}"
