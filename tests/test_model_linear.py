"""The packed CPU product against the plain one."""

from __future__ import annotations

import pytest
import torch

from megatron_sps2.model.linear import can_pack, linear, pack


@pytest.mark.parametrize("num_rows", [0, 1, 2, 16, 257])
@pytest.mark.parametrize("size", [(512, 1024), (96, 24), (37, 251)])
def test_packed_weight_gives_the_exact_product_in_fp32(num_rows: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(num_rows, 1, size[0]), torch.randn(size[1], size[0])
    if not can_pack(weight):
        pytest.skip("no oneDNN on this machine")
    found = linear(x, pack(weight))
    expected = x.double() @ weight.double().T
    assert found.shape == (num_rows, 1, size[1])
    # fp32 sums of k products of order 1: 1e-6 of their spread, sqrt(k), times the longest excursion.
    torch.testing.assert_close(found.double(), expected, atol=1e-5 * size[0] ** 0.5, rtol=0)


@pytest.mark.parametrize("num_rows", [1, 33])
def test_packed_weight_gives_the_plain_product_in_bf16(num_rows: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(num_rows, 1, 512).bfloat16(), torch.randn(256, 512).bfloat16()
    expected = (x.double() @ weight.double().T).float()
    # One rounding to bf16 at the end: 2**-8 of the value.
    torch.testing.assert_close(linear(x, pack(weight)).float(), expected, atol=1e-3, rtol=2**-8)


def test_input_that_is_a_strided_view_is_read_rightly() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(9, 1, 64)[..., :32], torch.randn(48, 32)
    torch.testing.assert_close(linear(x, pack(weight)), x @ weight.T, atol=1e-5, rtol=1e-5)


def test_what_cannot_be_packed_stays_plain() -> None:
    weight = torch.randn(8, 8).half()
    assert pack(weight) is weight
    packed = pack(torch.randn(8, 8))
    assert pack(packed) is packed
