"""Prefill: causal, unmasked as far keys are, and a few queries over many keys."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from benchmarks.gpu.case import Bench, Case, Row
from benchmarks.gpu.checks import LIMITS, attended, compare, poisoned, sampled_rows
from benchmarks.gpu.kernels import kernel
from benchmarks.gpu.libraries import library_times
from benchmarks.gpu.timing import milliseconds

K = 1024
HEADS = {"full": (32, 8), "quick": (32, 8), "tiny": (4, 2)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    name: str
    num_queries: int
    num_keys: int
    head_dim: int
    diagonal: int | None

    @property
    def num_pairs(self) -> int:
        """Queries x keys that they see."""
        if self.diagonal is None:
            return self.num_queries * self.num_keys
        return sum(min(self.num_keys, i + self.diagonal + 1) for i in range(self.num_queries))


def cases(bench: Bench) -> Iterator[Case]:
    for shape in _shapes(bench):
        yield Case(name=shape.name, measure=partial(_measure, bench, shape))


def _shapes(bench: Bench) -> Iterator[Shape]:
    causal = bench.pick(
        full=[(8 * K, 128), (32 * K, 128), (128 * K, 128), (8 * K, 64), (32 * K, 64), (128 * K, 64)],
        quick=[(8 * K, 128), (32 * K, 128), (32 * K, 64)],
        tiny=[(48, 16)],
    )
    for length, head_dim in causal:
        yield Shape(name="causal", num_queries=length, num_keys=length, head_dim=head_dim, diagonal=0)
    dim, few = bench.pick(full=128, quick=128, tiny=16), bench.pick(full=64, quick=64, tiny=3)
    square = bench.pick(full=16 * K, quick=8 * K, tiny=32)
    many = bench.pick(full=128 * K, quick=32 * K, tiny=64)
    yield Shape(name="far", num_queries=square, num_keys=square, head_dim=dim, diagonal=None)
    yield Shape(name="few queries", num_queries=few, num_keys=many, head_dim=dim, diagonal=None)


def _measure(bench: Bench, shape: Shape) -> Row:
    attend = kernel("prefill", "attend_prefill")
    heads, device, dtype = HEADS[bench.size], bench.device, torch.bfloat16
    scale = shape.head_dim**-0.5
    q, k, v = (
        torch.randn(length, 1, num_heads, shape.head_dim, device=device, dtype=dtype)
        for length, num_heads in (
            (shape.num_queries, heads[0]),
            (shape.num_keys, heads[1]),
            (shape.num_keys, heads[1]),
        )
    )
    with poisoned():
        out, lse = attend(q, k, v, scale=scale, diagonal=shape.diagonal)
    rows = sampled_rows(shape.num_queries, device)
    seen = None if shape.diagonal is None else rows + shape.diagonal
    wanted = attended(q[rows, 0], k[:, 0], v[:, 0], scale, seen)
    check = compare((out, lse), ((out[rows, 0], wanted[0]), (lse[rows, 0], wanted[1])), LIMITS[dtype])
    del out, lse, wanted
    taken = milliseconds(lambda _: attend(q, k, v, scale=scale, diagonal=shape.diagonal), device)
    others = library_times(q, k, v, scale, shape.diagonal)
    return Row(
        shape=f"{shape.num_queries}x{shape.num_keys}, {heads[0]}/{heads[1]} heads of {shape.head_dim}, bf16",
        milliseconds=taken,
        rate=4 * heads[0] * shape.head_dim * shape.num_pairs / taken / 1e9,
        unit="TFLOP/s",
        check=check,
        ratios={name: other / taken for name, other in others.items()},
    )
