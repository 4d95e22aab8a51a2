"""The kernel that turns and keeps, against the torch functions of the same signatures: every bit alike."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from megatron_sps2.ops import append as reference
from megatron_sps2.ops.paged import PagedKV, SlotRun, Slots, write_paged
from megatron_sps2.ops.quantized import dequantize, quantize
from megatron_sps2.ops.rotation import Rotation

pytest.importorskip("triton")
from megatron_sps2.ops.kernels import append as kernels  # noqa: E402

pytestmark = pytest.mark.triton

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NUM_SLOTS = 48
# Whoever takes -1 for 0 spoils what was just written there.
SLOTS = [3, 0, 47, -1, 17]


def make_kv(num_kv_heads: int, head_dim: int, dtype: torch.dtype, *, float8: bool) -> PagedKV:
    shape = (num_kv_heads, NUM_SLOTS, head_dim)
    keys, values = torch.randn(2, *shape, device=DEVICE)
    if not float8:
        return PagedKV(keys.to(dtype), values.to(dtype), 16)
    (keys, key_scales), (values, value_scales) = quantize(keys), quantize(values)
    return PagedKV(keys, values, 16, key_scales, value_scales)


def assert_same(one: Tensor | None, other: Tensor | None) -> None:
    """To the bit."""
    assert (one is None) == (other is None)
    if one is not None and other is not None:
        assert one.dtype == other.dtype
        assert torch.equal(*(each.contiguous().view(torch.uint8) for each in (one, other)))


def assert_same_contents(one: PagedKV, other: PagedKV) -> None:
    for name in ("keys", "values", "key_scales", "value_scales"):
        assert_same(getattr(one, name), getattr(other, name))


def make_tokens(num_heads: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v of the tokens of SLOTS, sizes from token to token very different; views of one tensor."""
    joined = torch.randn(len(SLOTS), num_heads + 2 * num_kv_heads, head_dim, device=DEVICE)
    joined *= torch.logspace(-3, 3, len(SLOTS), device=DEVICE)[:, None, None]
    return list(joined.to(dtype).split([num_heads, num_kv_heads, num_kv_heads], dim=1))


def make_rotation(rotary_dim: int, dtype: torch.dtype) -> Rotation:
    return Rotation.of(torch.rand(len(SLOTS), rotary_dim // 2, device=DEVICE).repeat(1, 2) * 1e5, dtype)


@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "rotary_dim"),
    [(32, 8, 128, 128), (9, 3, 64, 64), (6, 2, 80, 80), (5, 1, 96, 40), (12, 12, 256, 64)],
)
def test_turned_and_kept_to_the_bit_as_torch_does_it(
    num_heads: int, num_kv_heads: int, head_dim: int, rotary_dim: int, dtype: torch.dtype, float8: bool
) -> None:
    kv = make_kv(num_kv_heads, head_dim, dtype, float8=float8)
    other, slots = copy.deepcopy(kv), torch.tensor(SLOTS, device=DEVICE)
    q, k, v = make_tokens(num_heads, num_kv_heads, head_dim, dtype)
    rotation = make_rotation(rotary_dim, dtype)
    found = kernels.append_roped(q, k, v, rotation, kv, slots)
    want = reference.append_roped(q, k, v, rotation, other, slots)
    for x, y in zip(found, want, strict=True):
        assert_same(x, y)
    assert_same_contents(kv, other)


@pytest.mark.parametrize("float8", [False, True])
def test_without_a_rotation_tokens_are_kept_as_they_came(float8: bool) -> None:
    kv = make_kv(3, 80, torch.bfloat16, float8=float8)
    other, slots = copy.deepcopy(kv), torch.tensor(SLOTS, device=DEVICE)
    q, k, v = make_tokens(6, 3, 80, torch.bfloat16)
    found = kernels.append_roped(q, k, v, None, kv, slots)
    reference.append(other, slots, k, v)
    assert found[0] is q and found[1] is k
    assert_same_contents(kv, other)


def test_what_is_kept_may_have_another_dtype() -> None:
    kv = make_kv(2, 64, torch.bfloat16, float8=False)
    other, slots = copy.deepcopy(kv), torch.tensor(SLOTS, device=DEVICE)
    _, k, v = make_tokens(2, 2, 64, torch.float32)
    kernels.append(kv, slots, k, v)
    reference.append(other, slots, k, v)
    assert_same_contents(kv, other)


def test_runs_of_slots_are_written_as_torch_writes_them() -> None:
    kv, slots = make_kv(2, 64, torch.bfloat16, float8=False), Slots([SlotRun(7, 10), SlotRun(40, 42)])
    other = copy.deepcopy(kv)
    _, k, v = make_tokens(2, 2, 64, torch.bfloat16)
    kernels.write_paged(kv, slots, k, v)
    write_paged(other, slots, k, v)
    assert_same_contents(kv, other)


@pytest.mark.filterwarnings("ignore:invalid value")  # of numpy, which interprets
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_what_is_no_number_is_not_kept_as_one(poison: float) -> None:
    kv, slots = make_kv(2, 64, torch.float32, float8=True), torch.tensor(SLOTS, device=DEVICE)
    _, k, v = make_tokens(2, 2, 64, torch.float32)
    k[0, 1, 5] = poison
    kernels.append(kv, slots, k, v)
    assert kv.key_scales is not None
    found = dequantize(kv.keys, kv.key_scales)[:, SLOTS[0]]
    assert not found[1].isfinite().any() and found[0].isfinite().all()


@pytest.mark.parametrize("slots", [[-1] * 5, []])
def test_nothing_is_written_where_nothing_is_kept(slots: list[int]) -> None:
    kv = make_kv(2, 64, torch.float32, float8=False)
    before = copy.deepcopy(kv)
    q, k, v = (each[: len(slots)] for each in make_tokens(4, 2, 64, torch.float32))
    rotation = make_rotation(64, torch.float32)
    rotation = Rotation(rotation.cos[: len(slots)], rotation.sin[: len(slots)])
    places = torch.tensor(slots, dtype=torch.int64, device=DEVICE)
    found = kernels.append_roped(q, k, v, rotation, kv, places)
    for x, y in zip(found, reference.append_roped(q, k, v, rotation, copy.deepcopy(kv), places), strict=True):
        assert_same(x, y)
    assert_same_contents(kv, before)


def test_a_small_negative_number_is_kept_as_a_negative_zero() -> None:
    kv = make_kv(2, 64, torch.float32, float8=True)
    other, slots = copy.deepcopy(kv), torch.tensor([5], device=DEVICE)
    k = torch.full((1, 2, 64), -1e-6, device=DEVICE)
    k[:, :, 0] = 448.0
    kernels.append(kv, slots, k, -k)
    reference.append(other, slots, k, -k)
    assert (other.keys.view(torch.uint8)[:, 5, 1:] == 0x80).all()
    assert_same_contents(kv, other)
