"""Attention by libraries: which calls their masks serve, on CPU with stand-ins; on a GPU the libraries."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megatron_sps2.ops.attend import attend_reference
from megatron_sps2.ops.kernels.library import LIBRARIES, Library, cut_keys

DIAGONALS = [None, *range(-3, 13)]


def corner_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    """What FlashAttention documents: a causal mask ends in the lower right corner. lse `[b, n, sq, 1]`."""
    diagonal = k.shape[1] - q.shape[1] if causal else None
    assert diagonal is None or diagonal >= 0, "queries without keys"
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    out, lse = attend_reference(q, k, v, scale=scale, diagonal=diagonal)
    return out.transpose(0, 1), lse.permute(1, 2, 0).unsqueeze(-1)


def square_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    assert not causal or k.shape[1] == q.shape[1], "versions differ here"
    return corner_attention(q, k, v, scale, causal)


STAND_INS = [
    Library(name="corner", package="torch", run=corner_attention, max_head_dim=128, square=False),
    Library(name="square", package="torch", run=square_attention, max_head_dim=128, square=True),
]


@pytest.mark.parametrize("library", STAND_INS, ids=lambda library: library.name)
@pytest.mark.parametrize(("sq", "sk"), [(4, 4), (4, 10), (7, 5), (1, 6)])
def test_every_call_that_fits_is_attention_up_to_the_diagonal(sq: int, sk: int, library: Library) -> None:
    q = torch.randn(sq, 2, 4, 16, dtype=torch.bfloat16)
    k, v = (torch.randn(sk, 2, 2, 16, dtype=torch.bfloat16) for _ in "kv")
    fitting = [diagonal for diagonal in DIAGONALS if library.fits(q, k, diagonal)]
    assert None in fitting and (0 in fitting) == (sq <= sk or sk == 1)
    for diagonal in fitting:
        want = attend_reference(q, k, v, scale=0.25, diagonal=diagonal)
        out, lse = library.attend(q, k, lambda: v, scale=0.25, diagonal=diagonal)
        torch.testing.assert_close(out, want[0])
        torch.testing.assert_close(lse, want[1])


def test_keys_beyond_the_last_query_are_cut_off_and_not_read() -> None:
    q, k, v = (torch.randn(s, 1, 1, 16, dtype=torch.bfloat16) for s in (3, 9, 9))
    k[6:], v[6:] = torch.nan, torch.nan
    out, lse = STAND_INS[0].attend(q, k, v, scale=1.0, diagonal=3)
    assert out.isfinite().all() and lse.isfinite().all()


@pytest.mark.parametrize(
    ("sq", "sk", "diagonal", "square"),
    [(4, 4, -1, False), (5, 7, 3, False), (4, 9, 3, True), (0, 3, 0, False), (3, 0, None, False)],
)
def test_calls_that_no_cut_serves_are_refused(sq: int, sk: int, diagonal: int | None, square: bool) -> None:
    assert cut_keys(sq, sk, diagonal, square=square) is None


def test_dtypes_and_head_dims_that_libraries_lack_do_not_fit() -> None:
    for library in LIBRARIES:
        half = torch.zeros(4, 1, 2, 64, dtype=torch.bfloat16)
        assert library.fits(half, half, 0)
        assert not library.fits(half.float(), half.float(), 0)
        wide = torch.zeros(4, 1, 2, library.max_head_dim + 8, dtype=torch.bfloat16)
        odd = torch.zeros(4, 1, 2, 20, dtype=torch.bfloat16)
        assert not library.fits(wide, wide, 0) and not library.fits(odd, odd, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("diagonal", [None, 0, 33])
@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library.name)
def test_libraries_match_attention_written_out(library: Library, diagonal: int | None) -> None:
    if not library.installed:
        pytest.skip(f"{library.package} is not installed")
    q = torch.randn(200, 2, 8, 128, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(300, 2, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in "kv")
    if not library.fits(q, k, diagonal):
        pytest.skip("another library's mask")
    want_out, want_lse = attend_reference(q.float(), k.float(), v.float(), scale=0.088, diagonal=diagonal)
    out, lse = library.attend(q, k, v, scale=0.088, diagonal=diagonal)
    # Weights and results are rounded to bf16; scores are not, but exp2 is approximate.
    torch.testing.assert_close(out.float(), want_out, atol=3e-2, rtol=3e-2)
    torch.testing.assert_close(lse.float(), want_lse, atol=math.log(1 + 1e-3), rtol=0)
