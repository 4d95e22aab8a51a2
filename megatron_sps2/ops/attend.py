"""Attention of queries over keys with its log-sum-exp: one signature, a reference and fast implementations.

Pure tensor functions. Knows no rank, no cache and no model; partial results are joined by ops.merge.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_sps2.ops.blocked import attend_blocked
from megatron_sps2.ops.decode_attend import attend_few
from megatron_sps2.ops.product import fast_bf16

Values = Tensor | Callable[[], Tensor]
Attend = Callable[..., tuple[Tensor, Tensor]]

# Rows of a matmul (queries x query heads of a KV head) up to which copying keys costs more than it wins.
FEW_ROWS = 32


def attend(q: Tensor, k: Tensor, v: Values, *, scale: float, diagonal: int | None) -> tuple[Tensor, Tensor]:
    """q `[sq, b, n, d]`, k, v `[sk, b, n_kv, d]` -> out `[sq, b, n, d]` in q's dtype, lse `[sq, b, n]` fp32.

    Query head h reads KV head h // (n // n_kv). Query i sees keys j <= i + diagonal; None means all keys. A
    query that sees no key gives out 0 and lse -inf. `v` may be a function without arguments: it is called
    once, after the first scores, so that values may still be on their way when attention starts. What one
    batch entry and KV head gives does not depend, to the bit, on which others share the call.
    """
    check_shapes(q, k)
    return choose(q, k)(q, k, v, scale=scale, diagonal=diagonal)


def choose(q: Tensor, k: Tensor) -> Attend:
    """The implementation for these tensors."""
    few = q.shape[0] * q.shape[2] <= FEW_ROWS * k.shape[2]
    # bf16 keys are attended where they lie on CPU alone, where they are made fp32 a piece at a time.
    in_place = q.dtype == torch.float32 or (q.device.type == "cpu" and fast_bf16(q))
    return attend_few if few and in_place else attend_blocked


def check_shapes(q: Tensor, k: Tensor) -> None:
    """Raise ValueError unless q and k fit together."""
    if q.dim() != 4 or k.dim() != 4 or q.shape[1] != k.shape[1] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"q {tuple(q.shape)} and k {tuple(k.shape)} do not fit; want [sq, b, n, d] and [sk, b, n_kv, d]"
        )
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"{q.shape[2]} query heads cannot share {k.shape[2]} KV heads; n must be a multiple of n_kv"
        )


def attend_reference(
    q: Tensor, k: Tensor, v: Values, *, scale: float, diagonal: int | None
) -> tuple[Tensor, Tensor]:
    """`attend` as its formula, in fp32 and with the whole score matrix: for tests and short inputs."""
    v = v() if callable(v) else v
    heads_per_kv = q.shape[2] // k.shape[2]
    k, v = (x.float().repeat_interleave(heads_per_kv, dim=2) for x in (k, v))
    scores = torch.einsum("ibnd,jbnd->bnij", q.float(), k) * scale
    if diagonal is not None:
        rows, keys = torch.arange(q.shape[0])[:, None], torch.arange(k.shape[0])[None, :]
        scores.masked_fill_((keys > rows + diagonal).to(scores.device), -torch.inf)
    lse = torch.logsumexp(scores, dim=-1) if k.shape[0] else scores.new_full(scores.shape[:-1], -torch.inf)
    weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0).unsqueeze(-1)).exp()
    out = torch.einsum("bnij,jbnd->ibnd", weights, v)
    return out.to(q.dtype), lse.permute(2, 0, 1)
