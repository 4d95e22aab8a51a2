"""Turning queries and keys and keeping keys and values in one launch. Knows slots, not requests."""

from __future__ import annotations

import triton
from torch import Tensor

from megatron_sps2.ops.kernels.append_heads import append_heads
from megatron_sps2.ops.kernels.launch import interpreting
from megatron_sps2.ops.paged import PagedKV, Slots
from megatron_sps2.ops.rotation import Rotation

# Numbers of a program's heads: 16 for each of its 128 threads.
TILE_NUMBERS = 2048


def append_roped(
    q: Tensor, k: Tensor, v: Tensor, rotation: Rotation | None, kv: PagedKV, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """As `ops.append.append_roped`; the numbers of a head must lie together."""
    if rotation is None:
        append(kv, slots, k, v)
        return q, k
    turned = q.new_empty(q.shape), k.new_empty(k.shape)
    _launch(q, k, v, rotation, kv, slots, turned)
    return turned


def append(kv: PagedKV, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """As `ops.append.append`; the numbers of a head must lie together."""
    no_queries = k[:, :0]
    _launch(no_queries, k, v, None, kv, slots, (no_queries, k))


def write_paged(kv: PagedKV, slots: Slots, k: Tensor, v: Tensor) -> None:
    """As `ops.paged.write_paged`, in one launch."""
    assert len(slots) == len(k), f"{len(k)} tokens for {len(slots)} slots"
    append(kv, slots.tensor(k.device), k, v)


def _launch(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotation: Rotation | None,
    kv: PagedKV,
    slots: Tensor,
    turned: tuple[Tensor, Tensor],
) -> None:
    """Write `turned`, q and k, if there is a rotation, and what is kept."""
    num_tokens, num_kv_heads, head_dim = k.shape
    cos, sin = (rotation.cos, rotation.sin) if rotation else (None, None)
    assert all(x.stride(-1) == 1 for x in (q, k, v, kv.keys, kv.values)), "a head's numbers must lie together"
    assert cos is None or cos.dtype == q.dtype, f"{cos.dtype} cosines for {q.dtype} queries"
    if not num_tokens:
        return
    padded_dim = triton.next_power_of_2(head_dim)
    heads = min(TILE_NUMBERS // padded_dim, triton.next_power_of_2(max(q.shape[1], num_kv_heads)))
    num_query_tiles, num_kv_tiles = triton.cdiv(q.shape[1], heads), triton.cdiv(num_kv_heads, heads)
    append_heads[(num_tokens, num_query_tiles + num_kv_tiles)](
        q, k, v, cos, sin, *turned, kv.keys, kv.values, kv.key_scales, kv.value_scales, slots,
        q.shape[1], num_kv_heads, num_query_tiles,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], _stride(cos), _stride(sin),
        *kv.keys.stride()[:2], *kv.values.stride()[:2], _stride(kv.key_scales), _stride(kv.value_scales),
        ROTARY=0 if cos is None else cos.shape[1], HEAD_DIM=head_dim, PADDED_DIM=padded_dim, HEADS=heads,
        QUANTIZED=kv.key_scales is not None, INTERPRETED=interpreting(),
        enable_fp_fusion=False,  # each product is rounded by itself, as torch does it
    )  # fmt: skip


def _stride(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)
