"""Attention of a few queries over many keys, read where they lie: bound by memory. Knows tensors only.

Heads share calls, as a call costs microseconds, but never so that one head changes a bit of another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

# Keys that are made fp32 at a time: they should stay in the cache until they are multiplied.
CONVERTED_KEYS = 4096
# Keys from which on heads share a call.
MANY_KEYS = 256


def attend_few(
    q: Tensor, k: Tensor, v: Tensor | Callable[[], Tensor], *, scale: float, diagonal: int | None
) -> tuple[Tensor, Tensor]:
    """As `ops.attend.attend`; holds the scores of all queries and heads of one batch entry.

    Copies no key or value where `k[:, b, h]` is a run of memory, as in a cache laid out `[n_kv, slots, d]`.
    """
    sq = len(q)
    # Queries i < -diagonal see no key, and keys from `end` on are seen by none.
    blind = 0 if diagonal is None else min(sq, max(0, -diagonal))
    end = len(k) if diagonal is None else min(len(k), max(0, sq + diagonal))
    if not end or blind == sq:
        if not isinstance(v, Tensor):
            v()  # whoever sends the values counts on the call
        return q.new_zeros(q.shape), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    values = functools.cache(lambda: v if isinstance(v, Tensor) else v())
    seen = None if diagonal is None else diagonal + blind
    found = [
        _attend_entry(q[blind:, i], k[:end, i], lambda i=i: values()[:end, i], scale, seen)  # type: ignore[misc]
        for i in range(q.shape[1])
    ]
    out, lse = (
        found[0] if len(found) == 1 else (torch.cat(parts, dim=1) for parts in zip(*found, strict=True))
    )
    if blind:
        out = torch.cat((q.new_zeros(blind, *q.shape[1:]), out))
        lse = torch.cat((lse.new_full((blind, *q.shape[1:3]), -torch.inf), lse))
    return out, lse


def _attend_entry(
    q: Tensor, k: Tensor, values: Callable[[], Tensor], scale: float, diagonal: int | None
) -> tuple[Tensor, Tensor]:
    """q `[sq, n, d]`, k and values() `[sk, n_kv, d]` -> out `[sq, 1, n, d]`, lse `[sq, 1, n]`."""
    sq, num_heads, dim = q.shape
    group = num_heads // k.shape[1]
    # [n_kv, rows, d]: the queries that share a KV head are the rows of one matmul.
    rows = q.view(sq, -1, group, dim).transpose(0, 1).reshape(-1, sq * group, dim)
    scores = _scores(rows, k, scale)
    if diagonal is not None:
        _hide(scores.unflatten(1, (-1, group)), diagonal)
    out, lse = _weigh(scores, values())
    out = out.view(-1, sq, group, dim).transpose(0, 1).reshape(sq, 1, num_heads, dim)
    return out, lse.view(-1, sq, group).transpose(0, 1).reshape(sq, 1, num_heads)


def _scores(rows: Tensor, keys: Tensor, scale: float) -> Tensor:
    """`[n_kv, r, d]`, `[sk, n_kv, d]` -> scaled scores `[n_kv, r, sk]` in fp32.

    A bf16 matmul would round its fp32 sums to bf16, too coarse for an exponent; for few rows it is no faster.
    """
    rows, heads = rows.float() * scale, keys.transpose(0, 1)
    if keys.dtype == torch.float32:
        return _by_head(rows, heads.transpose(1, 2))
    pieces = heads.tensor_split(-(-len(keys) // CONVERTED_KEYS), dim=1)
    parts = [_by_head(rows, piece.float().transpose(1, 2)) for piece in pieces]
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
    return _by_head(weights.to(values.dtype), values.transpose(0, 1)), lse


def _by_head(x: Tensor, y: Tensor) -> Tensor:
    """`[n_kv, r, k]` times `[n_kv, k, c]`: one call for all heads, where that changes no bit of a head.

    For very few keys MKL takes another way through one matrix than through several.
    """
    if max(x.shape[2], y.shape[2]) < MANY_KEYS:
        return torch.stack([torch.mm(one, other) for one, other in zip(x, y, strict=True)])
    return torch.bmm(x, y)
