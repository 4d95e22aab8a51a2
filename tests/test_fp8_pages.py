"""Pages of float8: what is written and read, and attention that makes numbers of one piece at a time."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from megatron_sps2.ops import paged
from megatron_sps2.ops.paged import PagedKV, PagedRows, Slots, attend_paged, slot_runs, write_paged
from tests.rounded_attention import rounded

N, N_KV, D, BLOCK, NUM_BLOCKS = 6, 2, 16, 4, 64
# fp32: a softmax in pieces, over at most 100 keys. bf16: the parts and the result are rounded to 8 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-6}


def pages() -> PagedKV:
    """Never written: full of NaN."""
    shape = (N_KV, NUM_BLOCKS * BLOCK)
    keys, values = (torch.full((*shape, D), torch.nan).to(torch.float8_e4m3fn) for _ in range(2))
    return PagedKV(keys, values, BLOCK, *(torch.full(shape, torch.nan) for _ in range(2)))


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [n, d] over k, v [s, n_kv, d] -> [n, d], by torch's own attention, in fp32."""
    q, k, v = q.float()[:, None], k.float().transpose(0, 1), v.float().transpose(0, 1)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True, scale=0.25)[:, 0]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("piece", [7, 4096])
def test_rows_attend_to_rounded_keys_wherever_they_lie(
    dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ragged rows, one of them empty, one that begins late; blocks scattered, and neighbours for one row."""
    monkeypatch.setattr(paged, "CONVERTED_KEYS", piece)
    torch.manual_seed(piece)
    kv, free = pages(), random.Random(1).sample(range(40), 40)
    lengths, starts = [100, 1, 0, 33, 40], [0, 0, 0, 20, 0]
    tables = [[free.pop() for _ in range(-(-length // BLOCK))] for length in lengths[:-1]]
    tables.append(list(range(40, 50)))
    data = [[torch.randn(length, N_KV, D).to(dtype) for _ in range(2)] for length in lengths]
    for table, (k, v) in zip(tables, data, strict=True):
        write_paged(kv, Slots(slot_runs(table, 0, len(k), BLOCK)), k, v)
    q = torch.randn(len(lengths), N, D).to(dtype)
    out, lse = attend_paged(q, kv, PagedRows(tables, starts, lengths, BLOCK), scale=0.25)
    assert out.dtype == dtype and lse.dtype == torch.float32
    for i, ((k, v), start) in enumerate(zip(data, starts, strict=True)):
        if not len(k):
            assert not out[i].any() and (lse[i] == -torch.inf).all()
            continue
        k, v = (rounded(x.float()).to(dtype)[start:] for x in (k, v))
        torch.testing.assert_close(out[i].float(), plain(q[i], k, v), atol=TOLERANCE[dtype], rtol=0)
        scores = torch.einsum("nd,snd->ns", q[i].float(), k.float().repeat_interleave(N // N_KV, dim=1))
        torch.testing.assert_close(lse[i], (0.25 * scores).logsumexp(-1), atol=1e-4, rtol=0)


def test_only_one_piece_is_held_as_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged, "CONVERTED_KEYS", 10)
    kv, made, whole = pages(), list[int](), paged.dequantize

    def dequantize(stored: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        made.append(stored.shape[1])
        return whole(stored, scales, dtype)

    monkeypatch.setattr(paged, "dequantize", dequantize)
    table = [9, 3, 4, 5, 20, 1, 2]
    k, v = torch.randn(27, N_KV, D), torch.randn(27, N_KV, D)
    write_paged(kv, Slots(slot_runs(table, 0, 27, BLOCK)), k, v)
    attend_paged(torch.randn(1, N, D), kv, PagedRows([table], [0], [27], BLOCK), scale=0.25)
    assert made == [10, 10, 10, 10, 7, 7], "keys and values of 27 tokens"


def test_numbers_that_are_kept_as_they_came_are_read_in_place() -> None:
    keys, values = torch.randn(N_KV, NUM_BLOCKS * BLOCK, D), torch.randn(N_KV, NUM_BLOCKS * BLOCK, D)
    kv = PagedKV(keys, values, BLOCK)
    k, v = kv.read(slot_runs([3, 4], 0, 8, BLOCK), torch.float32)
    assert k.data_ptr() == keys[:, 12].data_ptr() and v.data_ptr() == values[:, 12].data_ptr()
    assert all(part is x for part, x in zip(kv.parts, (keys, values), strict=True))
