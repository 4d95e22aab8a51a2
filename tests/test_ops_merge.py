"""merge: attention over parts of the keys, put together, is attention over all of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_sps2.ops.attend import attend_reference
from megatron_sps2.ops.merge import merge


def split_attention(
    cuts: list[int], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-> outs, lses of causal attention over keys cut at `cuts`, and out, lse over all keys."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn((50, 2, 2, 64), generator=generator).to(dtype) for _ in "qkv")
    bounds = [0, *cuts, 50]
    parts = [
        attend_reference(q, k[low:high], v[low:high], scale=0.125, diagonal=-low)
        for low, high in zip(bounds, bounds[1:], strict=False)
    ]
    outs, lses = (torch.stack(x) for x in zip(*parts, strict=True))
    return outs, lses, *attend_reference(q, k, v, scale=0.125, diagonal=0)


@pytest.mark.parametrize("cuts", [[], [20], [1, 2, 49], [0, 25, 25, 50]])
def test_merged_parts_equal_the_whole(cuts: list[int]) -> None:
    outs, lses, want_out, want_lse = split_attention(cuts)
    out, lse = merge(outs, lses)
    # fp32, three roundings more than the whole.
    torch.testing.assert_close(out, want_out, atol=2e-6, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=2e-6, rtol=0)


def test_a_part_left_out_is_noticed() -> None:
    outs, lses, want_out, _ = split_attention([20, 30])
    out, _ = merge(outs[:2], lses[:2])
    assert (out - want_out).abs().max() > 1e-2


def test_bf16_parts_are_merged_in_fp32_and_returned_in_bf16() -> None:
    outs, lses, want_out, _ = split_attention([10, 20, 30], torch.bfloat16)
    out, lse = merge(outs, lses)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    # Each part was rounded to bf16 (8 bits) once and the result once more; values reach 4.
    torch.testing.assert_close(out, want_out, atol=3e-2, rtol=0)


def test_an_empty_part_counts_nothing_whatever_it_holds() -> None:
    outs, lses = torch.randn(2, 5, 3, 8), torch.randn(2, 5, 3)
    lses[1], outs[1] = -torch.inf, torch.nan
    out, lse = merge(outs, lses)
    torch.testing.assert_close(out, outs[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(lse, lses[0], atol=1e-6, rtol=0)


def test_nothing_but_empty_parts_gives_zero_and_minus_infinity() -> None:
    out, lse = merge(torch.zeros(3, 4, 8), torch.full((3, 4), -torch.inf))
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_distant_lses_do_not_overflow() -> None:
    outs, lses = (
        torch.stack([torch.ones(4, 8), torch.zeros(4, 8)]),
        torch.tensor([[900.0], [-900.0]]).expand(2, 4),
    )
    out, lse = merge(outs, lses)
    assert (out == 1).all() and (lse == 900).all()


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="must agree"):
        merge(torch.zeros(2, 4, 8), torch.zeros(2, 5))


def test_a_part_that_is_not_a_number_is_never_dropped() -> None:
    """Keys that are NaN give lse NaN; a merge that left such a part out would give a plausible wrong row."""
    outs, lses = torch.zeros(2, 3, 4), torch.zeros(2, 3)
    outs[0, 1], lses[0, 1] = torch.nan, torch.nan
    out, lse = merge(outs, lses)
    assert out[1].isnan().all() and lse[1].isnan()
    assert out[[0, 2]].isfinite().all() and lse[[0, 2]].isfinite().all()
