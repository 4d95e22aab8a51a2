"""Whether an output is right: against a reference, in memory that was poisoned before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.case import Check

# Root mean squares, relative. Inputs are exact; bf16 rounds weights and outputs to 2^-9 of themselves.
LIMITS = {torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float32: 1e-4}


@contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory is NaN: what a kernel forgets to write is seen."""
    settings: Any = torch.utils.deterministic
    was = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = was
        torch.use_deterministic_algorithms(False)


def compare(whole: Sequence[Tensor], pairs: Sequence[tuple[Tensor, Tensor]], limit: float) -> Check:
    """`whole` outputs must be finite; `pairs` are (found, wanted), the worst one counts, if there is any."""
    return Check(
        error=max((relative_error(found, wanted) for found, wanted in pairs), default=0.0),
        limit=limit,
        num_not_finite=sum(int((~torch.isfinite(x)).sum()) for x in whole),
    )


def relative_error(found: Tensor, wanted: Tensor) -> float:
    wanted = wanted.double()
    return float((found.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


def sampled_rows(num_rows: int, device: torch.device, count: int = 48) -> Tensor:
    """Rows to check of many: both ends, where masks are decided, and others in between."""
    ends = range(min(8, num_rows)), range(max(0, num_rows - 8), num_rows)
    between = torch.randint(num_rows, (count,)).tolist()
    return torch.tensor(sorted({*ends[0], *ends[1], *between}), device=device)


def attended(
    q: Tensor, k: Tensor, v: Tensor, scale: float, last_seen: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q `[r, n, d]`, k, v `[sk, n_kv, d]` -> out `[r, n, d]`, lse `[r, n]` in fp64, head by head.

    Row i sees keys j <= last_seen[i], all of them if None.
    """
    group, outs, lses = q.shape[1] // k.shape[1], [], []
    places = torch.arange(len(k), device=k.device)
    for head in range(q.shape[1]):
        keys, values = (x[:, head // group].double() for x in (k, v))
        scores = q[:, head].double() @ keys.t() * scale
        if last_seen is not None:
            scores.masked_fill_(places > last_seen[:, None], -torch.inf)
        outs.append(scores.softmax(-1) @ values)
        lses.append(scores.logsumexp(-1))
    return torch.stack(outs, 1), torch.stack(lses, 1)
