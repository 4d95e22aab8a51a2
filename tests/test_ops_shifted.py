"""Prefill attention with bf16 scores, shifted by a guess: against fp32, with guesses that turn out poor."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_sps2.ops import blocked, shifted
from megatron_sps2.ops.attend import attend_reference
from megatron_sps2.ops.blocked import attend_blocked, choose_softmax
from megatron_sps2.ops.running import RunningSoftmax
from megatron_sps2.ops.shifted import ShiftedSoftmax
from megatron_sps2.ops.tile import LN2
from tests.test_ops_attend import make, relative_error

# Rounded to 8 bits, an error of 1.7e-3 rms: weights, sums, the result; and scores a little.
BF16_ERROR = 4e-3
# A score is at most 6 powers of two above its guess, and rounded by 2^-8 of that.
LSE_ERROR = 6 * 2**-8 * LN2

pytestmark = pytest.mark.skipif(
    not torch.cpu._is_avx512_bf16_supported(), reason="only where the CPU multiplies bf16 are scores made so"
)


@pytest.fixture(autouse=True)
def many_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("TILE_KEYS", 128), ("MAX_QUERIES", 48), ("STRIP_QUERIES", 20), ("MANY_KEYS", 0)):
        monkeypatch.setattr(blocked, name, size)


def attend_both(
    q: Tensor, k: Tensor, v: Tensor, diagonal: int | None
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(ours in bf16, the reference in fp32), each (out, lse)."""
    assert choose_softmax(q, k) is ShiftedSoftmax
    want = attend_reference(q.float(), k.float(), v.float(), scale=0.125, diagonal=diagonal)
    return attend_blocked(q, k, v, scale=0.125, diagonal=diagonal), want


@pytest.mark.parametrize("spread", [1, 4, 30])
@pytest.mark.parametrize("diagonal", [None, 0, 43, -3])
def test_scores_are_nearly_exact_where_they_count(spread: int, diagonal: int | None) -> None:
    q, k, v = (x.bfloat16() for x in make(257, 300, n=6, n_kv=2))
    (out, lse), (want_out, want_lse) = attend_both(q * spread, k, v, diagonal)
    assert relative_error(out, want_out) < BF16_ERROR
    torch.testing.assert_close(lse, want_lse, atol=LSE_ERROR, rtol=0)


def late_favourite() -> tuple[Tensor, Tensor, Tensor]:
    """A key that outweighs all others by far, and that no guess is made of."""
    q, k, v = make(200, 300)
    k[171] = 30 * torch.nn.functional.normalize(k[171], dim=-1)
    return (q + k[171] / 3).bfloat16(), k.bfloat16(), v.bfloat16()


def test_a_poor_guess_is_raised() -> None:
    (out, lse), (want_out, want_lse) = attend_both(*late_favourite(), 100)
    assert want_lse[150:].min() > 20
    assert relative_error(out, want_out) < BF16_ERROR
    torch.testing.assert_close(lse, want_lse, atol=LSE_ERROR, rtol=0)


def test_a_guess_that_is_not_raised_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shifted, "MAX_ABOVE", torch.inf)
    (_, lse), (_, want_lse) = attend_both(*late_favourite(), 100)
    assert (lse - want_lse).abs().max() > 3 * LSE_ERROR


def test_few_keys_and_fp32_keep_fp32_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocked, "MANY_KEYS", 200)
    q, k, _ = (x.bfloat16() for x in make(100, 199))
    assert choose_softmax(q, k) is RunningSoftmax
    assert choose_softmax(q.float(), torch.cat([k, k]).float()) is RunningSoftmax
    assert choose_softmax(q, torch.cat([k, k])) is ShiftedSoftmax
