"""merge_partials, in Triton's interpreter or on a GPU, against `ops.merge.merge`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_sps2.ops.merge import merge

pytest.importorskip("triton")

from megatron_sps2.ops.kernels.merge import merge_partials  # noqa: E402

pytestmark = pytest.mark.triton
# Relative: fp32 in another order, or a rounding to the result's dtype (11 and 8 bits) to the other side.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2**-10, torch.bfloat16: 2**-7}


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def parts(shape: tuple[int, ...], device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """outs `shape`, lses of a spread at which each part counts something."""
    return torch.randn(shape, device=device).to(dtype), 2 * torch.randn(shape[:-1], device=device)


def check(outs: Tensor, lses: Tensor) -> None:
    want_out, want_lse = merge(outs, lses)
    out, lse = merge_partials(outs, lses)
    assert out.dtype == outs.dtype and lse.dtype == torch.float32
    torch.testing.assert_close(out, want_out, atol=2e-6, rtol=TOLERANCES[outs.dtype], equal_nan=True)
    torch.testing.assert_close(lse, want_lse, atol=2e-6, rtol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    "shape", [(3, 32), (1, 3, 2, 64), (2, 70, 128), (8, 5, 2, 3, 80), (3, 100, 1, 16), (2, 0, 4, 64)]
)
def test_matches_merge(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> None:
    check(*parts(shape, device, dtype))


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("heads", [(3,), (2, 3)])
def test_parts_may_lie_in_the_bytes_they_came_in(
    heads: tuple[int, ...], dtype: torch.dtype, device: str
) -> None:
    """Rows of `n * d numbers | n fp32`, as return_partials gives them."""
    outs, lses = parts((4, 9, *heads, 16), device, dtype)
    rows = torch.cat([x.flatten(2).view(torch.uint8) for x in (outs, lses)], dim=2)
    cut = rows.shape[2] - 4 * lses[0, 0].numel()
    views = rows[..., :cut].view(dtype).unflatten(2, (*heads, 16)), rows[..., cut:].view(torch.float32)
    check(views[0], views[1].unflatten(2, heads))
    want = merge_partials(outs, lses)
    assert torch.equal(merge_partials(views[0], views[1].unflatten(2, heads))[0], want[0])


def test_a_part_left_out_is_noticed(device: str) -> None:
    outs, lses = parts((3, 50, 2, 64), device)
    want, _ = merge(outs, lses)
    assert (merge_partials(outs[:2], lses[:2])[0] - want).abs().max() > 1e-2


def test_an_empty_part_counts_nothing_whatever_it_holds(device: str) -> None:
    outs, lses = parts((3, 5, 3, 16), device)
    lses[1], outs[1] = -torch.inf, torch.nan
    check(outs, lses)
    assert merge_partials(outs, lses)[0].isfinite().all()


def test_nothing_but_empty_parts_gives_zero_and_minus_infinity(device: str) -> None:
    out, lse = merge_partials(
        torch.full((3, 4, 16), torch.nan, device=device), torch.full((3, 4), -torch.inf, device=device)
    )
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_distant_lses_do_not_overflow(device: str) -> None:
    outs, lses = parts((2, 4, 16), device)
    lses[0], lses[1] = 900.0, -900.0
    out, lse = merge_partials(outs, lses)
    assert torch.equal(out, outs[0]) and (lse == 900).all()
    assert lses.exp().sum(0).log().isinf().all(), "control: sums as they stand do overflow"


def test_a_part_that_is_not_a_number_is_never_dropped(device: str) -> None:
    outs, lses = parts((3, 4, 2, 16), device)
    outs[0, 1], lses[0, 1] = torch.nan, torch.nan
    out, lse = merge_partials(outs, lses)
    assert out[1].isnan().all() and lse[1].isnan().all()
    assert out[[0, 2, 3]].isfinite().all() and lse[[0, 2, 3]].isfinite().all()


def test_shapes_that_do_not_fit_are_refused(device: str) -> None:
    with pytest.raises(ValueError, match="must agree"):
        merge_partials(torch.zeros(2, 4, 16, device=device), torch.zeros(2, 5, device=device))
