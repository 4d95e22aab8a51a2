"""attend: every implementation against fp32 attention written out, odd sizes, masks and strides included."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from megatron_sps2.ops import blocked, running
from megatron_sps2.ops.attend import attend, attend_reference, choose
from megatron_sps2.ops.blocked import attend_blocked
from megatron_sps2.ops.decode_attend import attend_few

Attend = Callable[..., tuple[Tensor, Tensor]]
FAST = (attend_blocked, attend_few)
SIZES = [(1, 1), (1, 257), (7, 300), (257, 257), (300, 7), (257, 600), (3, 0)]
# fp32 sums of up to 600 terms in another order: a few ulp of values near 1.
FP32_TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def many_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that short inputs cross several tiles of keys and blocks of queries."""
    monkeypatch.setattr(blocked, "TILE_KEYS", 64)
    monkeypatch.setattr(blocked, "MAX_QUERIES", 48)
    monkeypatch.setattr(blocked, "STRIP_QUERIES", 20)


def make(
    sq: int, sk: int, *, b: int = 1, n: int = 2, n_kv: int = 1, d: int = 64
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sq * 1000 + sk)
    q = torch.randn((sq, b, n, d), generator=generator)
    k, v = (torch.randn((sk, b, n_kv, d), generator=generator) for _ in "kv")
    return q, k, v


def agree(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], tolerance: float = FP32_TOLERANCE) -> None:
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x.float(), y.float(), atol=tolerance, rtol=tolerance)


def relative_error(out: Tensor, want: Tensor) -> float:
    return ((out.float() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("group", [1, 3])
def test_reference_matches_torch_sdpa(group: int) -> None:
    q, k, v = make(33, 33, b=2, n=2 * group, n_kv=2)
    out, _ = attend_reference(q, k, v, scale=0.125, diagonal=0)
    heads_first = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, is_causal=True, scale=0.125, enable_gqa=True
    )
    torch.testing.assert_close(out, want.permute(2, 0, 1, 3), atol=FP32_TOLERANCE, rtol=FP32_TOLERANCE)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("diagonal", [None, 0, -3, 5, -400, "end"])
@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize(("sq", "sk"), SIZES)
def test_fast_paths_match_the_reference(
    sq: int, sk: int, group: int, diagonal: int | str | None, implementation: Attend
) -> None:
    q, k, v = make(sq, sk, b=1, n=2 * group, n_kv=2)
    offset = sk - sq if isinstance(diagonal, str) else diagonal
    want = attend_reference(q, k, v, scale=0.125, diagonal=offset)
    agree(implementation(q, k, v, scale=0.125, diagonal=offset), want)


@pytest.mark.parametrize("implementation", FAST)
@pytest.mark.parametrize("group", [2, 8])
def test_fast_paths_match_for_other_groups_and_batches(group: int, implementation: Attend) -> None:
    q, k, v = make(70, 200, b=2, n=2 * group, n_kv=2)
    want = attend_reference(q, k, v, scale=0.125, diagonal=130)
    agree(implementation(q, k, v, scale=0.125, diagonal=130), want)


@pytest.mark.parametrize("implementation", FAST)
def test_a_mask_wrong_by_one_is_noticed(implementation: Attend) -> None:
    q, k, v = make(40, 90)
    want = attend_reference(q, k, v, scale=0.125, diagonal=50)
    with pytest.raises(AssertionError):
        agree(implementation(q, k, v, scale=0.125, diagonal=49), want)


@pytest.mark.parametrize("implementation", (*FAST, attend_reference))
def test_rows_without_keys_give_zero_and_minus_infinity(implementation: Attend) -> None:
    q, k, v = make(9, 5)
    out, lse = implementation(q, k, v, scale=0.125, diagonal=-4)
    assert (out[:4] == 0).all() and (lse[:4] == -torch.inf).all()
    assert lse[4:].isfinite().all()


@pytest.mark.parametrize("implementation", FAST)
def test_bf16_is_about_as_near_as_rounding_allows(implementation: Attend) -> None:
    # Scores of std 4, as trained models have them: rounding scores to bf16 would give an error of 2e-2.
    q, k, v = (x.bfloat16() for x in make(64, 700, n=4, n_kv=2))
    want_out, want_lse = attend_reference(q.float() * 4, k.float(), v.float(), scale=0.125, diagonal=636)
    out, lse = implementation(q * 4, k, v, scale=0.125, diagonal=636)
    # bf16 keeps 8 bits, an error of 1.7e-3 rms: once for the weights, once for a sum, once for the result;
    # one more here for each of the many small tiles.
    assert relative_error(out, want_out) < 4e-3
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    # lse is fp32 throughout in `blocked`; `few` keeps scores to 16 bits.
    torch.testing.assert_close(lse, want_lse, atol=1e-3, rtol=0)


@pytest.mark.parametrize("implementation", FAST)
def test_large_scores_do_not_overflow(implementation: Attend) -> None:
    q, k, v = make(70, 200)
    want = attend_reference(q * 1e3, k, v, scale=0.125, diagonal=130)
    # Scores near 1e3 in fp32 are known to 1e-4, and so are the weights made of them.
    agree(implementation(q * 1e3, k, v, scale=0.125, diagonal=130), want, 3e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sq", [1, 2, 6, 16])
@pytest.mark.parametrize("sk", [1, 2, 7, 255, 256, 257, 1000])
def test_heads_of_few_queries_do_not_depend_to_the_bit_on_each_other(
    sk: int, sq: int, dtype: torch.dtype
) -> None:
    q, k, v = (x.to(dtype) for x in make(sq, sk, n=4, n_kv=2))
    out, lse = attend_few(q, k, v, scale=0.125, diagonal=None)
    for head in range(2):
        heads = slice(2 * head, 2 * head + 2)
        alone = attend_few(q[:, :, heads], k[:, :, [head]], v[:, :, [head]], scale=0.125, diagonal=None)
        assert torch.equal(alone[0], out[:, :, heads]) and torch.equal(alone[1], lse[:, :, heads])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sq", [1, 100])
def test_a_head_does_not_depend_to_the_bit_on_the_others(sq: int, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in make(sq, 300, b=2, n=6, n_kv=3))
    out, lse = attend(q, k, v, scale=0.125, diagonal=300 - sq)
    for entry in range(2):
        for head in range(3):
            heads = slice(2 * head, 2 * head + 2)
            alone = (x[:, entry : entry + 1, h].clone() for x, h in ((q, heads), (k, [head]), (v, [head])))
            one_out, one_lse = attend(*alone, scale=0.125, diagonal=300 - sq)
            assert torch.equal(one_out[:, 0], out[:, entry, heads])
            assert torch.equal(one_lse[:, 0], lse[:, entry, heads])


@pytest.mark.parametrize("sq", [1, 60])
def test_inputs_may_be_slices_of_a_cache(sq: int) -> None:
    q, k, v = make(sq, 200, n=6, n_kv=3)
    want = attend_reference(q, k, v, scale=0.125, diagonal=200 - sq)
    storage = torch.full((2, 3, 256, 64), torch.nan)  # [k or v, n_kv, slots, d]; free slots hold anything
    storage[:, :, :200] = torch.stack([k, v])[:, :, 0].transpose(1, 2)
    cached = (storage[i, :, :200].transpose(0, 1).unsqueeze(1) for i in range(2))
    packed = torch.cat([q, q], dim=3)[..., 64:]
    agree(attend(packed, *cached, scale=0.125, diagonal=200 - sq), want)


@pytest.mark.parametrize("implementation", (*FAST, attend_reference))
@pytest.mark.parametrize("diagonal", [0, -100])
def test_values_may_arrive_late_and_are_asked_for_once(implementation: Attend, diagonal: int) -> None:
    q, k, v = make(100, 100, b=2, n=4, n_kv=2)
    asked: list[int] = []

    def arrive() -> Tensor:
        asked.append(1)
        return v

    late = implementation(q, k, arrive, scale=0.125, diagonal=diagonal)
    agree(late, implementation(q, k, v, scale=0.125, diagonal=diagonal), 0.0)
    assert len(asked) == 1


def test_scores_start_before_values_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    product = running.product
    monkeypatch.setattr(running, "product", lambda x, y: events.append("product") or product(x, y))
    q, k, v = make(100, 100)

    def arrive() -> Tensor:
        events.append("values")
        return v

    attend_blocked(q, k, arrive, scale=0.125, diagonal=0)
    assert events[:3] == ["product", "values", "product"]


def test_few_queries_leave_keys_in_place_and_many_are_blocked() -> None:
    q, k, _ = make(1, 50, n=6, n_kv=2)
    assert choose(q, k) is attend_few
    assert choose(q.expand(100, -1, -1, -1), k) is attend_blocked


def test_heads_that_do_not_divide_are_refused_by_name() -> None:
    q, k, v = make(4, 4, n=4, n_kv=3)
    with pytest.raises(ValueError, match="4 query heads cannot share 3 KV heads"):
        attend(q, k, v, scale=1.0, diagonal=0)
