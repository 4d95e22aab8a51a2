"""Merge partial attention over disjoint sets of keys through their log-sum-exp.

Knows tensors only; who computed the parts, and where, is not its business.
"""

from __future__ import annotations

import torch
from torch import Tensor


def merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """outs `[p, ..., d]`, lses `[p, ...]` -> out `[..., d]` in outs' dtype, lse `[...]` fp32.

    lse = log(sum_i exp(lse_i)), out = sum_i exp(lse_i - lse) out_i, in fp32. A part that saw no key has
    lse -inf and counts nothing, whatever its out holds; rows where every part is empty give 0 and -inf.
    """
    check_parts(outs, lses)
    lses = lses.float()
    top = lses.amax(dim=0)
    # exp(-inf - -inf) is NaN: shift empty rows by 0 instead, so that their weights are exp(-inf) = 0.
    weights = (lses - top.masked_fill(top == -torch.inf, 0.0)).exp_()
    total = weights.sum(dim=0)
    weights = (weights / total.clamp_min(torch.finfo(torch.float32).tiny)).unsqueeze(-1)
    # An empty part may hold anything (memory never written): 0 * NaN would spoil the row. A part whose keys
    # are not numbers (weight NaN) must spoil it: the answer would be wrong, and nobody told.
    out = torch.where(weights == 0, 0.0, outs.float() * weights).sum(dim=0)
    return out.to(outs.dtype), top + total.log()


def check_parts(outs: Tensor, lses: Tensor) -> None:
    """Raise ValueError unless there is one lse for each row of outs."""
    if outs.shape[:-1] != lses.shape:
        raise ValueError(f"outs {tuple(outs.shape)} and lses {tuple(lses.shape)} must agree up to head_dim")
