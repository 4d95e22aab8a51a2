"""float8 rows with scales: how near they come back, and what must come back exactly."""

from __future__ import annotations

import pytest
import torch

from megatron_sps2.ops.quantized import dequantize, quantize

# Three bits of mantissa: half a step of 1/8; numbers that float8 keeps as subnormals are off by half of 2^-9,
# where the row's largest is 448.
RELATIVE, ABSOLUTE = 2**-4, 2**-10 / 448
# bf16 rounds once more, to 8 bits.
SLACK = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@pytest.mark.parametrize("dtype", SLACK, ids=str)
def test_every_number_comes_back_within_half_a_step_of_its_row(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    # Rows from 1e-4 to 1e4: each has a scale of its own.
    sizes = torch.logspace(-4, 4, 40).unsqueeze(-1)
    x = (torch.randn(40, 3, 1, 64, generator=generator) * sizes[:, None, None]).to(dtype)
    stored, scales = quantize(x)
    assert stored.dtype == torch.float8_e4m3fn and stored.shape == x.shape
    assert scales.dtype == torch.float32 and scales.shape == x.shape[:-1]
    found = dequantize(stored, scales, dtype)
    assert found.dtype == dtype
    wide, largest = x.double(), x.double().abs().amax(-1, keepdim=True)
    allowed = (wide.abs() * RELATIVE).clamp_min(largest * ABSOLUTE) + wide.abs() * SLACK[dtype]
    assert ((found.double() - wide).abs() <= allowed).all()
    assert (found != x).double().mean() > 0.5, "nothing was rounded"


def test_the_largest_number_of_a_row_is_exact_to_fp32_and_numbers_float8_knows_are_exact() -> None:
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(2))
    found = dequantize(*quantize(x), torch.float32)
    places = x.abs().argmax(-1, keepdim=True)
    assert torch.allclose(found.gather(-1, places), x.gather(-1, places), rtol=1e-6, atol=0)
    whole = torch.tensor([448.0, -416.0, 1.5, 0.0, -(2.0**-9), 13.0])
    assert torch.equal(dequantize(*quantize(whole), torch.float32), whole)


def test_rounding_twice_changes_nothing_more() -> None:
    """What is read and written again, as a swapped or copied row, would else drift."""
    x = torch.randn(200, 32, generator=torch.Generator().manual_seed(3))
    once = dequantize(*quantize(x), torch.float32)
    assert torch.allclose(dequantize(*quantize(once), torch.float32), once, rtol=1e-6, atol=0)


def test_a_row_is_kept_alike_in_any_company() -> None:
    x = torch.randn(30, 2, 16, generator=torch.Generator().manual_seed(4))
    stored, scales = quantize(x)
    for row in (0, 7, 29):
        alone, scale = quantize(x[row : row + 1])
        assert torch.equal(alone[0].view(torch.uint8), stored[row].view(torch.uint8))
        assert torch.equal(scale[0], scales[row])


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-39])
def test_zeros_come_back_exactly_and_tiny_rows_finite(size: float) -> None:
    x = torch.tensor([[size, 0.0, -size, 0.0]])
    stored, scales = quantize(x)
    found = dequantize(stored, scales, torch.float32)
    assert found.isfinite().all() and (found[:, 1::2] == 0).all() and (found.abs() <= size * 1.1).all()
    assert (scales > 0).all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_poison_is_never_made_finite_and_stays_in_its_row(poison: float) -> None:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(5))
    clean = dequantize(*quantize(x), torch.float32)
    x[2, 3] = poison
    found = dequantize(*quantize(x), torch.float32)
    assert found[2].isnan().all()
    others = [0, 1, 3, 4]
    assert torch.equal(found[others], clean[others])
