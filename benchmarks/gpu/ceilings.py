"""What the card does at best: a large bf16 matmul, and a copy of gigabytes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.gpu.case import Bench, Case, Row
from benchmarks.gpu.timing import milliseconds


def cases(bench: Bench) -> Iterator[Case]:
    yield Case(name="matmul", measure=partial(_matmul, bench))
    yield Case(name="copy", measure=partial(_copy, bench))


def _matmul(bench: Bench) -> Row:
    """On random numbers: on zeros the card draws less power and is faster."""
    size = bench.pick(full=8192, quick=8192, tiny=64)
    x, y = (torch.randn(size, size, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(x)
    taken = milliseconds(lambda _: torch.mm(x, y, out=out), bench.device)
    return Row(shape=f"{size}^3 bf16", milliseconds=taken, rate=2 * size**3 / taken / 1e9, unit="TFLOP/s")


def _copy(bench: Bench) -> Row:
    num_bytes = bench.pick(full=4 << 30, quick=4 << 30, tiny=1 << 16)
    bench.needs(2 * num_bytes, "the copy")
    source = torch.randint(256, (num_bytes,), device=bench.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    taken = milliseconds(lambda _: target.copy_(source), bench.device)
    shape = f"{num_bytes / 2**30:.2g} GiB, read and written"
    return Row(shape=shape, milliseconds=taken, rate=2 * num_bytes / taken / 1e9, unit="TB/s")
