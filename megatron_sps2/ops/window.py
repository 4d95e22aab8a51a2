"""Attention of layers whose tokens see only the last `window` tokens, themselves among them.

Queries and keys come with their positions, in order but with any gaps. Pure tensor functions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_sps2.ops.product import product

# Queries whose keys are cut out together: more would read more keys that most of them do not see.
BLOCK_QUERIES = 256
# Scores of a KV head that are held at a time, at most, but for windows of more keys than that.
MAX_SCORES = 1 << 22


def attend_window(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, q_positions: Tensor, k_positions: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    """q `[sq, b, n, d]`, k, v `[sk, b, n_kv, d]` -> out `[sq, b, n, d]` in q's dtype, lse `[sq, b, n]` fp32.

    q_positions `[sq]` and k_positions `[sk]` rise. The query at i sees keys at i - window < j <= i; one that
    sees none gives out 0 and lse -inf.
    """
    out, lse = q.new_zeros(q.shape), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    group = q.shape[2] // k.shape[2]
    size = max(1, min(BLOCK_QUERIES, MAX_SCORES // (group * min(window, max(1, len(k))))))
    for start in range(0, len(q), size):
        rows = slice(start, start + size)
        places = q_positions[rows]
        ends = torch.stack([places[0] - window, places[-1]])
        first, last = torch.searchsorted(k_positions, ends, right=True).tolist()
        hidden = _hidden(places, k_positions[first:last], window)
        for entry in range(q.shape[1] if first < last else 0):
            part = _attend(q[rows, entry], k[first:last, entry], v[first:last, entry], hidden, scale)
            out[rows, entry], lse[rows, entry] = part
    return out, lse


def attend_window_reference(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float, q_positions: Tensor, k_positions: Tensor, window: int
) -> tuple[Tensor, Tensor]:
    """`attend_window` as its formula, in fp32 and with the whole score matrix: for tests."""
    k, v = (x.float().repeat_interleave(q.shape[2] // k.shape[2], dim=2) for x in (k, v))
    scores = torch.einsum("ibnd,jbnd->bnij", q.float(), k) * scale
    scores.masked_fill_(_hidden(q_positions, k_positions, window), -torch.inf)
    lse = torch.logsumexp(scores, dim=-1)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
    return torch.einsum("bnij,jbnd->ibnd", weights, v).to(q.dtype), lse.permute(2, 0, 1)


def _hidden(q_positions: Tensor, k_positions: Tensor, window: int) -> Tensor:
    """`[sq, sk]`, True where a query does not see a key."""
    before = q_positions[:, None] - k_positions[None, :]
    return (before < 0) | (before >= window)


def _attend(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One block: q `[sq, n, d]`, k, v `[sk, n_kv, d]` -> out `[sq, n, d]` fp32, lse `[sq, n]`."""
    group = q.shape[1] // k.shape[1]
    out, lse = q.new_empty(q.shape, dtype=torch.float32), q.new_empty(q.shape[:2], dtype=torch.float32)
    for head in range(k.shape[1]):
        mine = slice(head * group, (head + 1) * group)
        rows = (q[:, mine].float() * scale).flatten(0, 1)  # the query heads of a KV head, query by query
        scores = product(rows, k[:, head].float().contiguous().t()).view(len(q), group, len(k))
        scores.masked_fill_(hidden[:, None], -torch.inf)
        own = torch.logsumexp(scores, dim=-1)
        weights = (scores - own.masked_fill(own == -torch.inf, 0.0).unsqueeze(-1)).exp_()
        values = v[:, head].float().contiguous()
        out[:, mine] = product(weights.flatten(0, 1), values).view(len(q), group, -1)
        lse[:, mine] = own
    return out, lse
