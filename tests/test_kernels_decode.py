"""Decode kernels over paged keys against attention written out; whatever is not attended is NaN."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from megatron_sps2.ops.paged import PagedRows, attend_paged
from tests.paged_rows import (
    DEVICE,
    FP32_TOLERANCE,
    MIXED,
    as_float8,
    assert_right,
    assert_rows_are_alone,
    make_kv,
    make_queries,
    make_rows,
)

pytest.importorskip("triton")
from megatron_sps2.ops.kernels import decode, decode_plan  # noqa: E402

pytestmark = pytest.mark.triton

# Weights and the result are rounded to the dtype, by Triton's interpreter cut.
TOLERANCES = {torch.float32: FP32_TOLERANCE, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that is allocated without a value is NaN: whatever a kernel does not write shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def test_the_reference_is_attention_row_by_row() -> None:
    rows = make_rows(MIXED, 16)
    q, kv = make_queries(rows, 4, 64, torch.float32), make_kv(rows, 2, 64, torch.float32)
    assert_right(attend_paged, q, kv, rows)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size"),
    [(4, 1, 128, 16), (2, 2, 64, 4), (6, 2, 80, 8), (3, 1, 96, 48), (1, 1, 256, 16), (17, 1, 8, 16)],
)
def test_rows_of_mixed_lengths(num_heads: int, num_kv_heads: int, head_dim: int, block_size: int) -> None:
    rows = make_rows(MIXED, block_size)
    q = make_queries(rows, num_heads, head_dim, torch.float32)
    assert_right(decode.attend_paged, q, make_kv(rows, num_kv_heads, head_dim, torch.float32), rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    rows = make_rows(MIXED, 16)
    q, kv = make_queries(rows, 4, 64, dtype), make_kv(rows, 2, 64, dtype)
    assert_right(decode.attend_paged, q, kv, rows, TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_float8_keys_and_values_count_times_their_scales(dtype: torch.dtype) -> None:
    rows = make_rows(MIXED, 16)
    q, kv = make_queries(rows, 4, 64, dtype), as_float8(make_kv(rows, 2, 64, torch.float32))
    assert_right(decode.attend_paged, q, kv, rows, TOLERANCES[dtype])


def test_queries_and_keys_may_be_views_of_wider_tensors() -> None:
    rows = make_rows(MIXED, 16)
    kv = make_kv(rows, 2, 128, torch.float32)
    q = make_queries(rows, 7, 128, torch.float32)[:, 2:6, :64]
    assert_right(
        decode.attend_paged, q, replace(kv, keys=kv.keys[:, :, :64], values=kv.values[:, :, 64:]), rows
    )


def test_long_rows_have_longer_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (decode, decode_plan):
        monkeypatch.setattr(module, "MIN_SPLIT_TOKENS", 16)
    monkeypatch.setattr(decode, "max_splits", lambda _: 16)
    rows = make_rows([(0, 16 * 16), (0, 16 * 16 + 1), (7, 700), (0, 40)], 16)
    q, kv = make_queries(rows, 4, 64, torch.float32), make_kv(rows, 1, 64, torch.float32)
    assert_right(decode.attend_paged, q, kv, rows)


@pytest.mark.parametrize("quantized", [False, True])
def test_no_bit_of_a_row_depends_on_its_batch(quantized: bool) -> None:
    rows = make_rows(MIXED, 16)
    q, kv = make_queries(rows, 4, 64, torch.float32), make_kv(rows, 2, 64, torch.float32)
    assert_rows_are_alone(decode.attend_paged, q, as_float8(kv) if quantized else kv, rows)


def test_few_programs_do_the_work_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = make_rows(MIXED, 16)
    q, kv = make_queries(rows, 4, 64, torch.float32), make_kv(rows, 2, 64, torch.float32)
    want = decode.attend_paged(q, kv, rows, scale=0.125)
    monkeypatch.setattr(decode, "num_programs", lambda *_: 5)
    got = decode.attend_paged(q, kv, rows, scale=0.125)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("part", ["keys", "values"])
def test_a_number_that_is_none_spoils_its_row_and_head_and_no_other(part: str) -> None:
    rows = make_rows([(0, 300), (0, 300)], 16)
    q, kv = make_queries(rows, 4, 64, torch.float32), make_kv(rows, 2, 64, torch.float32)
    getattr(kv, part)[1, rows.runs[1][0].start] = torch.nan
    out, _ = decode.attend_paged(q, kv, rows, scale=0.125)
    assert out[1, 2:].isnan().all()
    assert not out[0].isnan().any() and not out[1, :2].isnan().any()


def test_batches_of_nothing() -> None:
    rows = make_rows([(0, 0), (3, 3)], 16)
    kv = make_kv(make_rows([(0, 16)], 16), 2, 64, torch.float32)
    out, lse = decode.attend_paged(torch.randn(2, 4, 64, device=DEVICE), kv, rows, scale=0.125)
    assert out.eq(0).all() and lse.eq(-torch.inf).all()
    no_rows = PagedRows([], [], [], 16)
    out, lse = decode.attend_paged(torch.randn(0, 4, 64, device=DEVICE), kv, no_rows, scale=0.125)
    assert out.shape == (0, 4, 64) and lse.shape == (0, 4)


@pytest.mark.parametrize("num_kv_heads", [1, 2, 3, 8, 12, 32, 2000])
def test_the_most_splits_are_a_power_of_two_and_bound_every_row(num_kv_heads: int) -> None:
    most, least = decode_plan.max_splits(num_kv_heads), decode_plan.MIN_SPLIT_TOKENS
    assert most & (most - 1) == 0 and 16 <= most <= 256
    for num_tokens in (0, 1, least, least + 1, most * least, most * least + 1, 1 << 20):
        size = max(1, -(-num_tokens // (most * least))) * least
        assert -(-num_tokens // size) <= decode_plan.num_splits_bound(num_tokens, most) <= most


@pytest.mark.parametrize("element_size", [1, 2, 4])
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
def test_two_programs_fit_on_a_multiprocessor(head_dim: int, element_size: int) -> None:
    tokens = decode_plan.tile_tokens(head_dim, element_size)
    held = decode_plan.num_stages(head_dim, element_size) - 1
    assert tokens >= 16 and tokens & (tokens - 1) == 0 and held >= 2
    padded = 1 << (head_dim - 1).bit_length()
    # Beside them lie queries, weights and what is exchanged between warps.
    assert 2 * (held * 2 * tokens * padded * element_size + 16 * 1024) <= 227 * 1024
