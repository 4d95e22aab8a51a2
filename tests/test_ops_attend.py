"""attend: every implementation against fp32 attention written out, odd sizes, masks and strides included."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_sps2.ops.attend import attend, attend_reference

# fp32 sums of up to 600 terms in another order: a few ulp of values near 1.
FP32_TOLERANCE = 1e-5


def make(sq: int, sk: int, *, b: int = 1, n: int = 2, n_kv: int = 1, d: int = 64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(sq * 1000 + sk)
    shapes = ((sq, b, n, d), (sk, b, n_kv, d), (sk, b, n_kv, d))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def agree(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], tolerance: float) -> None:
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.float(), y.float(), atol=tolerance, rtol=tolerance)


def test_reference_matches_torch_sdpa() -> None:
    q, k, v = make(33, 33, b=2, n=6, n_kv=2)
    out, _ = attend_reference(q, k, v, scale=0.125, diagonal=0)
    heads_first = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, is_causal=True, scale=0.125, enable_gqa=True
    )
    torch.testing.assert_close(out, want.permute(2, 0, 1, 3), atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE)


@pytest.mark.parametrize("diagonal", [None, 0, -3, 5, "end"])
@pytest.mark.parametrize("group", [1, 2, 3, 8])
@pytest.mark.parametrize(("sq", "sk"), [(1, 1), (1, 257), (7, 300), (257, 257), (300, 7), (257, 600)])
def test_attend_matches_the_reference(sq: int, sk: int, group: int, diagonal: int | str | None) -> None:
    q, k, v = make(sq, sk, b=2, n=2 * group, n_kv=2)
    offset = sk - sq if isinstance(diagonal, str) else diagonal
    want = attend_reference(q, k, v, scale=0.125, diagonal=offset)
    agree(attend(q, k, v, scale=0.125, diagonal=offset), want, FP32_TOLERANCE)
