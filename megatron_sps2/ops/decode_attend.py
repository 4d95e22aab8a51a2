"""Attention of a few queries over many keys, read where they lie: bound by memory. Knows tensors only."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from megatron_sps2.ops.blocked import LN2, product


def attend_few(
    q: Tensor, k: Tensor, v: Tensor | Callable[[], Tensor], *, scale: float, diagonal: int | None
) -> tuple[Tensor, Tensor]:
    """As `ops.attend.attend`; holds the scores of all queries of one KV head.

    Copies no key or value where `k[:, b, h]` is a run of memory, as in a cache laid out `[n_kv, slots, d]`.
    """
    group = q.shape[2] // k.shape[2]
    out, lse = q.new_zeros(q.shape), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    # Queries i < -diagonal see no key, and keys from `end` on are seen by none.
    blind = 0 if diagonal is None else min(len(q), max(0, -diagonal))
    end = len(k) if diagonal is None else min(len(k), max(0, len(q) + diagonal))
    arrive = functools.cache(lambda: v if isinstance(v, Tensor) else v())
    for entry, head in itertools.product(range(q.shape[1]), range(k.shape[2])):
        place = slice(blind, None), entry, slice(head * group, (head + 1) * group)
        if end and blind < len(q):
            # contiguous() copies nothing of such a cache; elsewhere it keeps results free of strides.
            scores = _scores(q[place].flatten(0, 1), k[:end, entry, head].contiguous()).mul_(scale / LN2)
            if diagonal is not None:
                _hide(scores.unflatten(0, (-1, group)), diagonal + blind)
            weights, row_lse = _softmax(scores)
            part = _weigh(weights, arrive()[:end, entry, head].contiguous())
            out[place], lse[place] = part.view_as(out[place]), row_lse.view_as(lse[place])
    arrive()
    return out, lse


def _scores(rows: Tensor, keys: Tensor) -> Tensor:
    """`[r, d]`, `[sk, d]` -> `[r, sk]` in fp32.

    A bf16 matmul rounds its fp32 sums to bf16, too coarse for an exponent: a second one gives what was lost.
    """
    if rows.dtype == torch.float32:
        return product(rows, keys.t())
    rounded = torch.mm(rows, keys.t())
    return rounded.float().add_(torch.addmm(rounded, rows, keys.t(), beta=-1))


def _hide(scores: Tensor, diagonal: int) -> None:
    """Set scores `[sq, g, sk]` of keys j > i + diagonal to -inf; only the last columns can hold any."""
    first = diagonal + 1
    if scores.shape[2] > first:
        above = torch.ones(scores.shape[0], scores.shape[2] - first, dtype=torch.bool, device=scores.device)
        scores[:, :, first:].masked_fill_(above.triu_().unsqueeze(1), -torch.inf)


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores `[r, sk]` to base 2, overwritten -> weights that sum to 1, and natural lse `[r, 1]`."""
    top = scores.amax(dim=1, keepdim=True)
    weights = scores.sub_(top).exp2_()
    total = weights.sum(dim=1, keepdim=True)
    return weights.div_(total), total.log2().add_(top).mul_(LN2)


def _weigh(weights: Tensor, values: Tensor) -> Tensor:
    """`[r, sk]`, `[sk, d]` -> `[r, d]`. Weights sum to 1 here, so a bf16 result is rounded once."""
    if values.dtype == torch.float32:
        return product(weights, values)
    return torch.mm(weights.to(values.dtype), values)
