"""Decode attention over paged keys: every row is cut into splits, which are attended side by side and joined.

Two launches in one stream. Their sizes come from what the host knows: nothing waits for the device, and both
can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_sps2.ops.kernels.decode_plan import (
    MIN_SPLIT_TOKENS,
    max_splits,
    num_programs,
    num_splits_bound,
    num_stages,
    tile_tokens,
)
from megatron_sps2.ops.kernels.decode_splits import attend_splits, join_splits
from megatron_sps2.ops.kernels.launch import interpreting, num_multiprocessors
from megatron_sps2.ops.paged import PagedKV, PagedRows

LOG2_E = 1.4426950408889634
# Dimensions of a head that one program joins: small, so that even one row's heads make many programs.
JOINED_DIMS = 32


def attend_paged(q: Tensor, kv: PagedKV, rows: PagedRows, *, scale: float) -> tuple[Tensor, Tensor]:
    """As `ops.paged.attend_paged`: q `[b, n, d]` -> out `[b, n, d]`, lse `[b, n]` fp32.

    How a row is cut depends on its own number of tokens and on n_kv alone: to the bit, it does not matter
    which rows share the batch. The numbers of a head must lie together.
    """
    num_rows, num_heads, head_dim = q.shape
    assert all(x.stride(-1) == 1 for x in (q, kv.keys, kv.values)), "the numbers of a head must lie together"
    out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), _fp32(q, num_rows, num_heads)
    if not num_rows:
        return out, lse
    most = max_splits(len(kv.keys))
    bound = num_splits_bound(rows.max_tokens, most)
    parts, part_lses = _fp32(q, num_rows, num_heads, bound, head_dim), _fp32(q, num_rows, num_heads, bound)
    tensors = rows.tensors(q.device)
    if bound:
        _attend_splits(q, kv, tensors, scale, parts, part_lses, most)
    join_splits[(num_rows, num_heads, triton.cdiv(head_dim, JOINED_DIMS))](
        parts, part_lses, *tensors[1:], out, lse, num_heads, bound,
        HEAD_DIM=head_dim, DIMS=JOINED_DIMS, MAX_SPLITS=most, MIN_SPLIT=MIN_SPLIT_TOKENS,
    )  # fmt: skip
    return out, lse


def _attend_splits(
    q: Tensor,
    kv: PagedKV,
    rows: tuple[Tensor, Tensor, Tensor],
    scale: float,
    parts: Tensor,
    lses: Tensor,
    most: int,
) -> None:
    """Fill parts `[b, n, splits, d]` and lses `[b, n, splits]` as far as rows have splits."""
    num_rows, num_heads, bound, head_dim = parts.shape
    num_kv_heads = len(kv.keys)
    group = num_heads // num_kv_heads
    padded_group = max(16, triton.next_power_of_2(group))  # the fewest rows of a matmul
    key_scales, value_scales = kv.key_scales, kv.value_scales
    attend_splits[(num_programs(num_rows * num_kv_heads * bound, num_multiprocessors(q.device)),)](
        q, kv.keys, kv.values, key_scales, value_scales, *rows, parts, lses,
        scale * LOG2_E, num_rows, num_kv_heads, bound,
        *q.stride()[:2], *kv.keys.stride()[:2], *kv.values.stride()[:2],
        0 if key_scales is None else key_scales.stride(0),
        0 if value_scales is None else value_scales.stride(0),
        rows[0].stride(0),
        ROWS=max(64, triton.next_power_of_2(num_rows)),  # few variants to compile
        GROUP=group, PADDED_GROUP=padded_group,
        HEAD_DIM=head_dim, PADDED_DIM=max(16, triton.next_power_of_2(head_dim)), BLOCK_SIZE=kv.block_size,
        TILE=tile_tokens(head_dim, kv.keys.element_size()), MAX_SPLITS=most, MIN_SPLIT=MIN_SPLIT_TOKENS,
        QUANTIZED=key_scales is not None, TYPE=_matmul_type(q.dtype, key_scales is not None),
        num_warps=8 if padded_group >= 64 else 4,
        num_stages=num_stages(head_dim, kv.keys.element_size()),
    )  # fmt: skip


def _matmul_type(dtype: torch.dtype, quantized: bool) -> tl.dtype:
    """What queries of `dtype` and keys, weights and values are multiplied in.

    float8 becomes fp16 in one instruction, bf16 in three, and queries beyond fp16's 65504 have scores that no
    softmax survives. The interpreter's matmuls are right in fp32 only.
    """
    if dtype == torch.float32 or interpreting():
        return tl.float32
    return tl.bfloat16 if dtype == torch.bfloat16 and not quantized else tl.float16


def _fp32(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=torch.float32)
