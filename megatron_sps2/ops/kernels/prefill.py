"""Attention of many queries over keys, or of few over many keys, in Triton: `ops.attend.attend` on a GPU.

Pure tensor functions. The kernel is in ops.kernels.flash, the sizes of its tiles in ops.kernels.tiles.
"""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_sps2.ops.attend import Values, check_shapes
from megatron_sps2.ops.kernels import HEAD_DIM_STEP, MAX_HEAD_DIM
from megatron_sps2.ops.kernels.flash import flash_kernel
from megatron_sps2.ops.kernels.launch import capability, interpreting, num_multiprocessors
from megatron_sps2.ops.kernels.merge import merge_as
from megatron_sps2.ops.kernels.tiles import Tiles, choose_tiles, keys_per_split

# What the copy engine's addresses and strides are multiples of, in bytes.
COPY_ALIGNMENT = 16


def attend_prefill(
    q: Tensor, k: Tensor, v: Values, *, scale: float, diagonal: int | None
) -> tuple[Tensor, Tensor]:
    """`ops.attend.attend` for bf16, fp16 and fp32, and a head_dim that is a multiple of 8 up to 256.

    `v` as a function is called before the launch: on a GPU it makes the stream wait, not this thread.
    """
    check_shapes(q, k)
    if q.shape[3] % HEAD_DIM_STEP or q.shape[3] > MAX_HEAD_DIM:
        raise ValueError(
            f"head_dim {q.shape[3]} has no kernel; it takes a multiple of {HEAD_DIM_STEP} up to "
            f"{MAX_HEAD_DIM}: use kernels='torch'"
        )
    assert scale > 0 and q.stride(3) == 1, (scale, q.stride())
    v = v() if callable(v) else v
    sq, sk = q.shape[0], k.shape[0]
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q), q.new_full(q.shape[:3], -torch.inf, dtype=torch.float32)
    offset = sk if diagonal is None else min(max(diagonal, -sq), sk)
    num_rows = sq * (q.shape[2] // k.shape[2])
    tiles = choose_tiles(num_rows, q.shape[3], q.dtype, capability(q.device))
    reach = max(1, min(sk, sq + offset))  # Keys that any query sees.
    chunk = keys_per_split(num_rows, reach, tiles, num_multiprocessors(q.device))
    outs, lses = _launch(q, k, v, scale, offset, tiles, chunk, num_splits=triton.cdiv(reach, chunk))
    return (outs[0], lses[0]) if len(outs) == 1 else merge_as(q.dtype, outs, lses)


def _launch(
    q: Tensor, k: Tensor, v: Tensor, scale: float, diagonal: int, tiles: Tiles, chunk: int, num_splits: int
) -> tuple[Tensor, Tensor]:
    """-> outs `[num_splits, sq, b, n, d]`, fp32 if there are several, and lses `[num_splits, sq, b, n]`."""
    sq, b, n, d = q.shape
    sk, _, n_kv, _ = k.shape
    outs = q.new_empty((num_splits, *q.shape), dtype=q.dtype if num_splits == 1 else torch.float32)
    lses = q.new_empty((num_splits, sq, b, n), dtype=torch.float32)
    block_d = max(16, triton.next_power_of_2(d))
    keys, values = (_described(x, tiles.keys, block_d) for x in (k, v))
    num_tiles = triton.cdiv(sq * (n // n_kv), tiles.rows)
    flash_kernel[(num_splits * num_tiles * b * n_kv,)](
        q, keys, values, outs, lses, *q.stride()[:3],
        sq, sk, b, n_kv, diagonal, chunk, num_tiles, num_splits, scale * math.log2(math.e),
        GROUP=n // n_kv, D=d, BLOCK_D=block_d, ROWS=tiles.rows, KEYS=tiles.keys,
        UPCAST=interpreting(), PRECISION="ieee", num_warps=tiles.num_warps, num_stages=tiles.num_stages,
    )  # fmt: skip
    return outs, lses


def _described(x: Tensor, keys: int, block_d: int) -> TensorDescriptor:
    """x `[sk, b, n_kv, d]` -> `[b, n_kv, sk, d]` for the copy engine, in blocks of `keys` x `block_d`.

    It fills what lies outside with zeros. A tensor that it cannot step through is copied first.
    """
    if not _is_steppable(x):
        x = x.clone(memory_format=torch.contiguous_format)
    x = x.permute(1, 2, 0, 3)
    # The stride of a dim of one entry is never stepped by, and may be anything.
    strides = [step if size > 1 else x.shape[3] for size, step in zip(x.shape, x.stride(), strict=True)]
    return TensorDescriptor(x, list(x.shape), [*strides[:3], 1], [1, 1, keys, block_d])


def _is_steppable(x: Tensor) -> bool:
    """Whether the copy engine takes x as it lies: numbers of a head adjacent, address and strides aligned."""
    steps = [step * x.element_size() for step, size in zip(x.stride(), x.shape, strict=True) if size > 1][:-1]
    aligned = all(place % COPY_ALIGNMENT == 0 for place in (x.data_ptr(), *steps))
    return x.stride(3) == 1 and aligned and 0 not in steps
