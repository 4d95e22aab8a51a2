"""Keys and values in float8: what comes back."""

from __future__ import annotations

import pytest
import torch

from megatron_sps2.ops.quantized import LARGEST, dequantize, quantize

# Half of the last of four significant bits, of the number itself; below 2^-6 of float8, of its least step.
ROUNDING, LEAST_STEP = 2.0**-4, 2.0**-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_numbers_come_back_within_float8_of_themselves(dtype: torch.dtype) -> None:
    x = (torch.randn(200, 3, 64) * torch.logspace(-3, 3, 200)[:, None, None]).to(dtype)
    numbers, scales = quantize(x)
    assert numbers.dtype == torch.float8_e4m3fn and scales.dtype == torch.float32
    assert scales.shape == x.shape[:-1]
    error = (dequantize(numbers, scales) - x.float()).abs()
    allowed = torch.maximum(x.float().abs() * ROUNDING, scales.unsqueeze(-1) * LEAST_STEP / 2)
    assert (error <= allowed * (1 + 1e-6)).all()


def test_the_largest_of_a_row_is_float8s_largest() -> None:
    x = torch.randn(50, 64)
    numbers, _ = quantize(x)
    assert (numbers.float().abs().amax(-1) == LARGEST).all()


def test_zeros_come_back_as_zeros_and_tiny_rows_as_numbers() -> None:
    tiny = torch.full((2, 8), 1e-44)
    assert dequantize(*quantize(torch.zeros(2, 8))).eq(0).all()
    assert dequantize(*quantize(tiny)).isfinite().all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_a_row_with_what_is_no_number_comes_back_as_none(poison: float) -> None:
    x = torch.randn(3, 8)
    x[1, 5] = poison
    found = dequantize(*quantize(x))
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


def test_a_row_depends_on_itself_alone() -> None:
    x = torch.randn(20, 64)
    numbers, scales = quantize(x)
    alone, own = quantize(x[7])
    assert torch.equal(numbers[7].view(torch.uint8), alone.view(torch.uint8)) and torch.equal(scales[7], own)
