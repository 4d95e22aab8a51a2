"""Merging of partial attention in one pass over parts that lie anywhere: `ops.merge.merge` in Triton.

Knows tensors only. A part may be a view into the bytes it was received in.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_sps2.ops.merge import check_parts

# Numbers that one program merges: 16 of each part for each of its threads.
NUMBERS = 2048


def merge_partials(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """`ops.merge.merge`: outs `[p, ..., d]`, lses `[p, ...]` -> out `[..., d]` in their dtype, lse `[...]`.

    Rows (dim 1) may have any stride, in outs and in lses; the numbers of one head must be adjacent.
    """
    return merge_as(outs.dtype, outs, lses)


def merge_as(dtype: torch.dtype, outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """`merge_partials` with the result in `dtype`."""
    check_parts(outs, lses)
    assert outs.stride(-1) == 1, outs.stride()
    out = outs.new_empty(outs.shape[1:], dtype=dtype)
    lse = lses.new_empty(lses.shape[1:], dtype=torch.float32)
    # [p, rows, heads, d]: views, unless there are more dims than two and their strides do not fit together.
    outs, lses = (x[(slice(None), *[None] * (3 - lses.dim()))] for x in (outs, lses))
    outs, lses = outs.flatten(2, -2), lses.flatten(2)
    p, rows, heads, d = outs.shape
    block_d = triton.next_power_of_2(d)
    block = max(1, NUMBERS // block_d)
    merge_kernel[(triton.cdiv(rows * heads, block),)](
        outs, lses, out, lse, *outs.stride()[:3], *lses.stride(), p, rows * heads, heads,
        D=d, BLOCK_D=block_d, BLOCK=block,
    )  # fmt: skip
    return out, lse


@triton.jit(do_not_specialize=["p", "num_rows"])
def merge_kernel(
    outs, lses, out, lse, out_part, out_row, out_head, lse_part, lse_row, lse_head, p, num_rows, heads,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """outs `[p, rows, heads, d]`, lses `[p, rows, heads]` strided -> BLOCK rows of out, lse, contiguous."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = index < num_rows
    dims = tl.arange(0, BLOCK_D)
    inside = there[:, None] & (dims < D)[None, :]
    lses += index // heads * lse_row + index % heads * lse_head
    outs += (index // heads * out_row + index % heads * out_head)[:, None] + dims[None, :]

    top = tl.full([BLOCK], -float("inf"), tl.float32)
    at = lses
    for _ in range(p):
        top = tl.maximum(top, tl.load(at, mask=there, other=0.0).to(tl.float32))
        at += lse_part
    # exp(-inf - -inf) would be NaN: rows where every part is empty are shifted by 0, and get weights of 0.
    shift = tl.where(top == -float("inf"), 0.0, top)
    total = tl.zeros([BLOCK], tl.float32)
    at = lses
    for _ in range(p):
        total += tl.exp(tl.load(at, mask=there, other=0.0).to(tl.float32) - shift)
        at += lse_part
    total = tl.where(total == 0.0, 1.0, total)
    acc = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for _ in range(p):
        weight = (tl.exp(tl.load(lses, mask=there, other=0.0).to(tl.float32) - shift) / total)[:, None]
        part = tl.load(outs, mask=inside, other=0.0).to(tl.float32)
        # An empty part may hold anything, and 0 * NaN is not 0; a weight that is NaN must spoil the row.
        acc += tl.where(weight == 0.0, 0.0, part * weight)
        lses += lse_part
        outs += out_part
    tl.store(lse + index, top + tl.log(total), mask=there)
    tl.store(out + index[:, None] * D + dims[None, :], acc.to(out.dtype.element_ty), mask=inside)
