"""attend_prefill, in Triton's interpreter or on a GPU, against attention written out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_sps2.ops.attend import attend_reference

pytest.importorskip("triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from megatron_sps2.ops.kernels import flash, prefill  # noqa: E402
from megatron_sps2.ops.kernels.prefill import attend_prefill  # noqa: E402
from megatron_sps2.ops.kernels.tiles import choose_tiles, keys_per_split  # noqa: E402

pytestmark = pytest.mark.triton
HOPPER = (9, 0)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
# Of the result's rounding and, on a GPU, the weights': 8, 11 and 24 bits; values reach 4.
TOLERANCES = {BF16: 3e-2, FP16: 4e-3, FP32: 1e-5}
# lse is fp32 whatever the inputs are: sums of a few hundred terms in another order.
LSE_TOLERANCE = 1e-5


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


Make = Callable[..., tuple[Tensor, Tensor, Tensor]]


@pytest.fixture
def make(device: str) -> Make:
    """Fresh random q, k, v."""

    def inputs(
        sq: int, sk: int, *, b: int = 1, n: int = 2, n_kv: int = 1, d: int = 64, dtype: torch.dtype = BF16
    ) -> tuple[Tensor, Tensor, Tensor]:
        q = torch.randn((sq, b, n, d), device=device)
        k, v = (torch.randn((sk, b, n_kv, d), device=device) for _ in "kv")
        return q.to(dtype), k.to(dtype), v.to(dtype)

    return inputs


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel leaves unwritten is NaN."""
    new_empty = Tensor.new_empty

    def new_nan(like: Tensor, *args: object, **kwargs: object) -> Tensor:
        return new_empty(like, *args, **kwargs).fill_(torch.nan)  # type: ignore[arg-type]

    monkeypatch.setattr(Tensor, "new_empty", new_nan)


def split_into(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys are attended in `count` parts, rounded up to whole tiles."""
    monkeypatch.setattr(
        prefill,
        "keys_per_split",
        lambda rows, keys, tiles, _: -(-keys // (count * tiles.keys)) * tiles.keys,
    )


def check(q: Tensor, k: Tensor, v: Tensor, diagonal: int | None) -> None:
    want_out, want_lse = attend_reference(q.float(), k.float(), v.float(), scale=0.125, diagonal=diagonal)
    out, lse = attend_prefill(q, k, v, scale=0.125, diagonal=diagonal)
    assert out.dtype == q.dtype and lse.dtype == FP32
    torch.testing.assert_close(lse, want_lse, atol=LSE_TOLERANCE, rtol=LSE_TOLERANCE)
    torch.testing.assert_close(out.float(), want_out, atol=TOLERANCES[q.dtype], rtol=TOLERANCES[q.dtype])


@pytest.mark.parametrize("diagonal", [None, 0, -3, 5, -400, "end"])
@pytest.mark.parametrize(("sq", "sk"), [(1, 1), (7, 300), (140, 140), (130, 7)])
def test_matches_attention_written_out(make: Make, sq: int, sk: int, diagonal: int | str | None) -> None:
    check(*make(sq, sk), sk - sq if isinstance(diagonal, str) else diagonal)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
@pytest.mark.parametrize("d", [8, 16, 64, 80, 96, 128, 256])
def test_head_dims_and_dtypes(make: Make, d: int, dtype: torch.dtype) -> None:
    check(*make(20, 75, d=d, dtype=dtype), 55)


@pytest.mark.parametrize("group", [1, 3, 4])
def test_heads_that_share_keys_and_batches(make: Make, group: int) -> None:
    check(*make(45, 150, b=2, n=2 * group, n_kv=2), 105)


@pytest.mark.parametrize("diagonal", [None, 250, 100, -5, -300])
@pytest.mark.parametrize("parts", [2, 3])
def test_keys_attended_in_parts(
    make: Make, parts: int, diagonal: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    split_into(parts, monkeypatch)
    check(*make(20, 270, b=2, n=4, n_kv=2), diagonal)


def test_few_queries_over_many_keys_are_split(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    parts: list[int] = []
    merge_as = prefill.merge_as
    monkeypatch.setattr(
        prefill, "merge_as", lambda dtype, o, x: parts.append(len(o)) or merge_as(dtype, o, x)
    )
    check(*make(2, 5000), 4998)
    assert parts == [3]


def test_a_mask_wrong_by_one_is_noticed(make: Make) -> None:
    q, k, v = make(40, 90)
    _, want = attend_reference(q.float(), k.float(), v.float(), scale=0.125, diagonal=50)
    _, lse = attend_prefill(q, k, v, scale=0.125, diagonal=49)
    assert ((lse - want).abs() > 10 * LSE_TOLERANCE).float().mean() > 0.9


def test_queries_without_keys_give_zero_and_minus_infinity(make: Make) -> None:
    q, k, v = make(9, 5)
    out, lse = attend_prefill(q, k, v, scale=0.125, diagonal=-4)
    assert (out[:4] == 0).all() and (lse[:4] == -torch.inf).all() and lse[4:].isfinite().all()


@pytest.mark.parametrize(("sq", "sk"), [(3, 0), (0, 3), (0, 0)])
def test_no_queries_or_no_keys(make: Make, sq: int, sk: int) -> None:
    out, lse = attend_prefill(*make(sq, sk), scale=0.125, diagonal=None)
    assert out.shape == (sq, 1, 2, 64) and lse.shape == (sq, 1, 2)
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_large_scores_do_not_overflow(make: Make) -> None:
    q, k, v = make(30, 100, dtype=FP32)
    want_out, want_lse = attend_reference(q * 1e3, k, v, scale=0.125, diagonal=70)
    out, lse = attend_prefill(q * 1e3, k, v, scale=0.125, diagonal=70)
    # Scores near 1e3 in fp32 are known to 1e-4, and so are the weights made of them.
    torch.testing.assert_close(out, want_out, atol=3e-3, rtol=3e-3)
    torch.testing.assert_close(lse, want_lse, atol=3e-3, rtol=0)


@triton.jit
def unshifted_softmax(scores, scale_log2, top, total):  # type: ignore[no-untyped-def]
    """As flash.running_softmax, right while no weight is beyond fp32."""
    weights = tl.math.exp2(scores * scale_log2)
    return weights, tl.full(total.shape, 1.0, tl.float32), tl.zeros_like(top), total + tl.sum(weights, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a compiled kernel keeps the softmax that it has")
def test_control_a_softmax_without_its_top_overflows_on_large_scores_alone(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash, "running_softmax", unshifted_softmax)
    q, k, v = make(30, 100, dtype=FP32)
    check(q, k, v, 70)
    out, _ = attend_prefill(q * 1e3, k, v, scale=0.125, diagonal=70)
    assert not out.isfinite().all()


def test_keys_that_are_not_numbers_are_told(make: Make) -> None:
    q, k, v = make(6, 20)
    k[10] = torch.nan
    out, lse = attend_prefill(q, k, v, scale=0.125, diagonal=7)
    assert lse[:3].isfinite().all() and out[:3].isfinite().all()
    assert lse[3:].isnan().all() and out[3:].isnan().all()


@pytest.mark.parametrize("parts", [1, 2])
def test_a_head_does_not_depend_to_the_bit_on_the_others(
    make: Make, parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if parts > 1:
        split_into(parts, monkeypatch)
    q, k, v = make(30, 200, b=2, n=4, n_kv=2)
    out, lse = attend_prefill(q, k, v, scale=0.125, diagonal=170)
    for entry in range(2):
        for head in range(2):
            heads = slice(2 * head, 2 * head + 2)
            alone = (x[:, entry : entry + 1, h] for x, h in ((q, heads), (k, [head]), (v, [head])))
            one_out, one_lse = attend_prefill(*alone, scale=0.125, diagonal=170)
            assert torch.equal(one_out[:, 0], out[:, entry, heads])
            assert torch.equal(one_lse[:, 0], lse[:, entry, heads])


@pytest.mark.parametrize("shift", [0, 1])
def test_inputs_may_be_slices_of_a_cache(make: Make, shift: int) -> None:
    """With shift 1 at odd addresses, which the copy engine cannot read: those keys are copied first."""
    q, k, v = make(20, 100, n=6, n_kv=3)
    slots = torch.full((2, 3, 128 * 64 + shift), torch.nan, dtype=BF16, device=q.device)
    storage = slots[..., shift:].unflatten(-1, (128, 64))  # [k or v, n_kv, slots, d]
    storage[:, :, :100] = torch.stack([k, v])[:, :, 0].transpose(1, 2)
    cached = (storage[i, :, :100].transpose(0, 1).unsqueeze(1) for i in range(2))
    packed = torch.cat([torch.full_like(q, torch.nan), q], dim=3)[..., 64:]
    want = attend_prefill(q, k, v, scale=0.125, diagonal=80)
    out, lse = attend_prefill(packed, *cached, scale=0.125, diagonal=80)
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1])
    check(q, k, v, 80)


def test_the_stride_of_a_single_batch_entry_or_head_may_be_anything(make: Make) -> None:
    q, k, v = make(20, 100)
    odd = k.as_strided(k.shape, (64, 7, 9, 1))
    assert odd.is_contiguous() and torch.equal(odd, k)
    want = attend_prefill(q, k, v, scale=0.125, diagonal=80)
    assert torch.equal(attend_prefill(q, odd, v, scale=0.125, diagonal=80)[0], want[0])


def test_values_may_arrive_late_and_are_asked_for_once(make: Make) -> None:
    q, k, v = make(10, 30)
    asked: list[int] = []
    late = attend_prefill(q, k, lambda: asked.append(1) or v, scale=0.125, diagonal=20)
    want = attend_prefill(q, k, v, scale=0.125, diagonal=20)
    assert torch.equal(late[0], want[0]) and len(asked) == 1


def test_head_dims_without_a_kernel_are_refused_by_name(make: Make) -> None:
    with pytest.raises(ValueError, match="head_dim 20 has no kernel"):
        attend_prefill(*make(4, 4, d=20), scale=0.125, diagonal=0)


def test_a_long_prompt_is_not_split_and_few_queries_fill_the_card() -> None:
    for queries, keys, least, most in [(1 << 17, 1 << 17, 1, 1), (64, 1 << 17, 32, 33), (64, 1000, 1, 1)]:
        rows = 4 * queries
        tiles = choose_tiles(rows, 128, BF16, HOPPER)
        chunk = keys_per_split(rows, keys, tiles, num_multiprocessors=132)
        assert chunk % tiles.keys == 0 and least <= -(-keys // chunk) <= most


def test_splits_read_much_more_than_they_write() -> None:
    for rows in (1, 16, 64, 128, 1000):
        tiles = choose_tiles(rows, 128, BF16, HOPPER)
        chunk = keys_per_split(rows, 1 << 20, tiles, num_multiprocessors=132)
        assert 8 * tiles.rows <= 4 * chunk / 15
