"""Attention by libraries that others keep fast, through the signature of `ops.attend.attend`.

Each masks in its own way: which calls that mask serves is worked out here, and a library is asked whether it
`fits` before it is used. Knows tensors only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from megatron_sps2.ops.attend import Values, check_shapes

# (q [b, sq, n, d], k, v [b, sk, n_kv, d], scale, causal) -> out [b, sq, n, d], lse [b, n, sq, maybe 1] fp32.
# Causal is asked for only where the last query sees the last key and no query sees none.
Run = Callable[[Tensor, Tensor, Tensor, float, bool], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True)
class Cut:
    """The first `num_keys` keys, with or without a causal mask that ends in the corner."""

    num_keys: int
    causal: bool


def cut_keys(num_queries: int, num_keys: int, diagonal: int | None, *, square: bool) -> Cut | None:
    """How a library whose causal mask ends in the lower right corner attends up to `diagonal`, if it can.

    Keys beyond the last query's are left out, and then the corner is where it should be. `square`: causal
    masks are for as many keys as queries only, since versions differ about the others.
    """
    if num_queries == 0 or num_keys == 0:
        return None
    if diagonal is None or diagonal >= num_keys - 1:
        return Cut(num_keys, causal=False)
    # Below 0 some queries see nothing, for which libraries give an lse of their own taste.
    if diagonal < 0 or num_queries + diagonal > num_keys or (square and diagonal > 0):
        return None
    return Cut(num_queries + diagonal, causal=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """One library: `attend` is `ops.attend.attend` for the calls that it `fits`."""

    name: str
    package: str
    run: Run
    max_head_dim: int
    square: bool

    @property
    def installed(self) -> bool:
        return find_spec(self.package) is not None

    def fits(self, q: Tensor, k: Tensor, diagonal: int | None) -> bool:
        """Whether `attend` may be called with these; on a device where the library runs at all."""
        cut = cut_keys(q.shape[0], k.shape[0], diagonal, square=self.square)
        known = q.dtype in (torch.bfloat16, torch.float16) and q.shape[3] % 8 == 0
        return known and q.shape[3] <= self.max_head_dim and cut is not None

    def attend(
        self, q: Tensor, k: Tensor, v: Values, *, scale: float, diagonal: int | None
    ) -> tuple[Tensor, Tensor]:
        """`ops.attend.attend`; `v` as a function is called before the launch."""
        check_shapes(q, k)
        cut = cut_keys(q.shape[0], k.shape[0], diagonal, square=self.square)
        assert cut is not None, (self.name, q.shape, k.shape, diagonal)
        v = v() if callable(v) else v
        q, k, v = (x.transpose(0, 1) for x in (q, k[: cut.num_keys], v[: cut.num_keys]))
        out, lse = self.run(q, k, v, scale, cut.causal)
        b, sq, n, _ = q.shape
        return out.transpose(0, 1), lse.reshape(b, n, sq).permute(2, 0, 1)


def _flash3(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    attend = import_module("flash_attn_interface").flash_attn_func
    out, lse = attend(q, k, v, softmax_scale=scale, causal=causal, return_attn_probs=True)
    return out, lse


def _flash2(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    attend = import_module("flash_attn").flash_attn_func
    out, lse, _ = attend(q, k, v, softmax_scale=scale, causal=causal, return_attn_probs=True)
    return out, lse


def _cudnn(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *heads_first, attn_bias=None, compute_log_sumexp=True, is_causal=causal, scale=scale
    )
    return out.transpose(1, 2), lse


def _torch_flash(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        *heads_first, is_causal=causal, scale=scale
    )
    return out.transpose(1, 2), lse


LIBRARIES = (
    Library(
        name="flash-attention-3", package="flash_attn_interface", run=_flash3, max_head_dim=256, square=False
    ),
    Library(name="cudnn", package="torch", run=_cudnn, max_head_dim=128, square=True),
    Library(name="flash-attention-2", package="flash_attn", run=_flash2, max_head_dim=256, square=False),
    Library(name="torch-flash", package="torch", run=_torch_flash, max_head_dim=256, square=True),
)
