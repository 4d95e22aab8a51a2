"""Decode attention compiled for this processor against attention written out; pages of nobody are NaN."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from megatron_sps2.ops import paged
from megatron_sps2.ops.kernel_set import TORCH, choose_kernels
from megatron_sps2.ops.paged import PagedKV, PagedRows
from tests.paged_rows import (
    FP32_TOLERANCE,
    MIXED,
    as_float8,
    assert_right,
    assert_rows_are_alone,
    make_kv,
    make_queries,
    make_rows,
)

pytest.importorskip("numba")
from megatron_sps2.ops.cpu import decode  # noqa: E402

CPU = torch.device("cpu")
TOLERANCES = {torch.float32: FP32_TOLERANCE, torch.bfloat16: 4e-3, torch.float16: 2e-3}


def make_batch(
    rows: PagedRows, heads: tuple[int, int, int], dtype: torch.dtype = torch.float32, quantized: bool = False
) -> tuple[Tensor, PagedKV]:
    """heads: of queries, of keys, and their size. Quantized numbers are made of fp32 ones."""
    num_heads, num_kv_heads, head_dim = heads
    kv = make_kv(rows, num_kv_heads, head_dim, torch.float32 if quantized else dtype, CPU)
    return make_queries(rows, num_heads, head_dim, dtype, CPU), as_float8(kv) if quantized else kv


@pytest.mark.parametrize(
    ("heads", "block_size"),
    [
        ((4, 1, 128), 16),
        ((2, 2, 64), 1),
        ((6, 2, 80), 7),
        ((9, 3, 64), 64),
        ((1, 1, 256), 100),
        ((3, 3, 5), 256),
    ],
)
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rows_of_mixed_lengths(
    heads: tuple[int, int, int], block_size: int, dtype: torch.dtype, quantized: bool
) -> None:
    rows = make_rows(MIXED, block_size)
    assert_right(decode.attend_paged, *make_batch(rows, heads, dtype, quantized), rows, TOLERANCES[dtype])


def use_threads(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """However few keys there are."""
    decode._threads.cache_clear()
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    monkeypatch.setattr(decode, "MIN_KEYS", 1)


def test_batches_of_all_sizes_share_a_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    use_threads(monkeypatch, 4)
    before = set(threading.enumerate())
    for num_rows in range(1, 9):
        rows = make_rows([(0, 40)] * num_rows, 16)
        assert_right(decode.attend_paged, *make_batch(rows, (4, 2, 64)), rows)
    assert 1 <= len(set(threading.enumerate()) - before) <= 3


@pytest.mark.parametrize("num_threads", [1, 3])
def test_long_rows_are_cut_and_joined(num_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    use_threads(monkeypatch, num_threads)
    monkeypatch.setattr(decode, "PIECE", 96)
    rows = make_rows([(0, 96), (0, 97), (7, 700), (0, 0), (300, 492)], 16)
    q, kv = make_batch(rows, (4, 2, 64))
    assert_right(decode.attend_paged, q, kv, rows)
    # Control: other cuts do change bits, so that the next test says something.
    found = decode.attend_paged(q, kv, rows, scale=0.125)
    monkeypatch.setattr(decode, "PIECE", 80)
    assert not torch.equal(found[0], decode.attend_paged(q, kv, rows, scale=0.125)[0])


@pytest.mark.parametrize("quantized", [False, True])
def test_no_bit_of_a_row_depends_on_its_batch_or_on_threads(
    quantized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = make_rows([*MIXED, (0, decode.PIECE + 5)], 16)
    q, kv = make_batch(rows, (4, 2, 64), quantized=quantized)
    one = decode.attend_paged(q, kv, rows, scale=0.125)
    use_threads(monkeypatch, 3)
    for x, y in zip(decode.attend_paged(q, kv, rows, scale=0.125), one, strict=True):
        assert torch.equal(x, y)
    assert_rows_are_alone(decode.attend_paged, q, kv, rows)


def test_queries_may_be_a_view_of_a_wider_tensor() -> None:
    rows = make_rows(MIXED, 16)
    q, _ = make_batch(rows, (7, 2, 128))
    _, kv = make_batch(rows, (4, 2, 64))
    assert_right(decode.attend_paged, q[:, 2:6, 64:], kv, rows)


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    """The first key's score is thousands above the others', or below them, and a weight of 1e-30 counts."""
    rows = make_rows([(0, 200)], 16)
    q, kv = torch.ones(1, 2, 4), make_kv(rows, 2, 4, torch.float32, CPU)
    for size in (3e3, -3e3, 8.5, -8.5):
        kv.keys[:, rows.runs[0][0].start] = size
        assert_right(decode.attend_paged, q, kv, rows)
    kv.keys[:, :] = -17.0  # each weight beside the first is exp(-68)
    first = rows.runs[0][0].start
    kv.keys[:, first], kv.values[:, first] = 17.0, 0.0
    out, _ = decode.attend_paged(q, kv, rows, scale=0.5)
    want, _ = paged.attend_paged_reference(q, kv, rows, scale=0.5)
    assert want.abs().max() > 0
    torch.testing.assert_close(out, want, rtol=1e-4, atol=0)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("part", ["keys", "values"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("quantized", [False, True])
def test_a_poisoned_token_spoils_its_row_and_head_as_in_torch(
    part: str, poison: float, dtype: torch.dtype, quantized: bool
) -> None:
    rows = make_rows([(0, 300), (0, 300)], 16)
    q, kv = make_batch(rows, (4, 2, 64), dtype)
    getattr(kv, part)[1, rows.runs[1][5].start] = poison
    kv = as_float8(kv) if quantized else kv
    out, _ = decode.attend_paged(q, kv, rows, scale=0.125)
    want, _ = paged.attend_paged(q, kv, rows, scale=0.125)
    assert torch.equal(out.isfinite(), want.isfinite())
    assert not out[1, 2:].isfinite().all() and out[0].isfinite().all() and out[1, :2].isfinite().all()


def test_every_float8_is_the_number_that_torch_reads() -> None:
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    keys, ones = torch.zeros(1, 256, 1).to(torch.float8_e4m3fn), torch.ones(1, 256)
    rows = PagedRows([[slot] for slot in range(256)], [0] * 256, [1] * 256, 1)
    kv = PagedKV(keys, values.view(1, 256, 1), 1, ones, ones)
    out, _ = decode.attend_paged(torch.ones(256, 1, 1), kv, rows, scale=1.0)
    torch.testing.assert_close(out[:, 0, 0], values.float(), rtol=0, atol=0, equal_nan=True)


def test_batches_of_nothing() -> None:
    rows = make_rows([(0, 0), (3, 3)], 16)
    kv = make_kv(make_rows([(0, 16)], 16), 2, 64, torch.float32, CPU)
    out, lse = decode.attend_paged(torch.randn(2, 4, 64), kv, rows, scale=0.125)
    assert out.eq(0).all() and lse.eq(-torch.inf).all()
    out, lse = decode.attend_paged(torch.randn(0, 4, 64), kv, PagedRows([], [], [], 16), scale=0.125)
    assert out.shape == (0, 4, 64) and lse.shape == (0, 4)


def test_numba_serves_cpus_by_itself_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_kernels("auto", CPU).attend_paged is decode.attend_paged
    assert choose_kernels("auto", CPU).attend is TORCH.attend
    assert choose_kernels("torch", CPU) is TORCH
    with pytest.raises(ValueError, match="kernels='numba' but the device is cuda; use 'triton' or 'torch'"):
        choose_kernels("numba", torch.device("cuda"))
    monkeypatch.setattr("megatron_sps2.ops.kernel_set.find_spec", lambda name: None)
    assert choose_kernels("auto", CPU) is TORCH
    with pytest.raises(ValueError, match="kernels='numba' but numba is not installed; pip install numba"):
        choose_kernels("numba", CPU)


def test_an_install_that_nobody_may_write_to_compiles_at_each_start(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = pytest.importorskip("megatron_sps2.ops.cpu.decode_kernel")
    real = kernel.njit

    def refusing(*args: object, cache: bool = False, **settings: object) -> object:
        if cache:
            raise RuntimeError("cannot cache function 'double': no locator available")
        return real(*args, **settings)

    monkeypatch.setattr(kernel, "njit", refusing)
    assert kernel.compiled(lambda x: 2 * x)(4) == 8
