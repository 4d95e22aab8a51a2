"""Attention of a few queries over many keys, read where they lie: bound by memory. Knows tensors only.

All heads share each call, as a call costs microseconds; what a head gives does not depend on the others.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Keys that are made fp32 at a time: they should stay in the cache until they are multiplied.
CONVERTED_KEYS = 1024


def attend_few(
    q: Tensor, k: Tensor, v: Tensor | Callable[[], Tensor], *, scale: float, diagonal: int | None
) -> tuple[Tensor, Tensor]:
    """As `ops.attend.attend`; holds the scores of all queries and heads of one batch entry.

    Copies no key or value where `k[:, b, h]` is a run of memory, as in a cache laid out `[n_kv, slots, d]`.
    """
    group, sq = q.shape[2] // k.shape[2], len(q)
    out, lse = q.new_zeros(q.shape), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    # Queries i < -diagonal see no key, and keys from `end` on are seen by none.
    blind = 0 if diagonal is None else min(sq, max(0, -diagonal))
    end = len(k) if diagonal is None else min(len(k), max(0, sq + diagonal))
    values = v if isinstance(v, Tensor) else None
    for entry in range(q.shape[1] if end and blind < sq else 0):
        # [n_kv, rows, d]: the queries that share a KV head are the rows of one matmul.
        rows = q[blind:, entry].unflatten(1, (-1, group)).transpose(0, 1).flatten(1, 2)
        scores = _scores(rows, k[:end, entry], scale)
        if diagonal is not None:
            _hide(scores.unflatten(1, (-1, group)), diagonal + blind)
        if values is None:
            values = v()  # type: ignore[operator]
        part, part_lse = _weigh(scores, values[:end, entry])
        out[blind:, entry] = part.unflatten(1, (-1, group)).transpose(0, 1).flatten(1, 2)
        lse[blind:, entry] = part_lse.unflatten(1, (-1, group)).transpose(0, 1).flatten(1, 2)
    if values is None:
        v()  # type: ignore[operator]  # whoever sends the values counts on the call
    return out, lse


def _scores(rows: Tensor, keys: Tensor, scale: float) -> Tensor:
    """`[n_kv, r, d]`, `[sk, n_kv, d]` -> scaled scores `[n_kv, r, sk]` in fp32.

    A bf16 matmul would round its fp32 sums to bf16, too coarse for an exponent, and be no faster for so few rows.
    """
    rows, heads = rows.float() * scale, keys.transpose(0, 1)
    if keys.dtype == torch.float32:
        return torch.bmm(rows, heads.transpose(1, 2))
    parts = [torch.bmm(rows, part.float().transpose(1, 2)) for part in heads.split(CONVERTED_KEYS, dim=1)]
    return torch.cat(parts, dim=2) if len(parts) > 1 else parts[0]


def _hide(scores: Tensor, diagonal: int) -> None:
    """Set scores `[n_kv, sq, g, sk]` of keys j > i + diagonal to -inf; only the last columns can hold any."""
    first = diagonal + 1
    if scores.shape[3] > first:
        above = torch.ones(scores.shape[1], scores.shape[3] - first, dtype=torch.bool, device=scores.device)
        scores[..., first:].masked_fill_(above.triu_().unsqueeze(1), -torch.inf)


def _weigh(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """`[n_kv, r, sk]`, `[sk, n_kv, d]` -> out `[n_kv, r, d]` in the values' dtype, lse `[n_kv, r]`."""
    weights = torch.softmax(scores, dim=-1)
    # The largest weight is exp(largest score - lse).
    lse = scores.amax(dim=-1) - weights.amax(dim=-1).log_()
    # Weights sum to 1, so a bf16 result is rounded once.
    return torch.bmm(weights.to(values.dtype), values.transpose(0, 1)), lse
