"""One shard of the KV cache: what is written is read, in whatever blocks; a refusal writes nothing."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from megatron_sps2.attention.kv_cache import KVCache, SlotRun
from megatron_sps2.config import CacheConfig, KVCacheDType, KVCacheFull
from megatron_sps2.ops.quantized import dequantize, quantize

LAYERS, HEADS, D = 2, 3, 4


def make_cache(
    num_blocks: int = 16,
    block_size: int = 4,
    dtype: torch.dtype = torch.float32,
    kv_cache_dtype: KVCacheDType = "auto",
) -> KVCache:
    config = CacheConfig(num_blocks=num_blocks, block_size=block_size)
    return KVCache(
        config,
        num_layers=LAYERS,
        num_kv_heads=HEADS,
        head_dim=D,
        dtype=dtype,
        kv_cache_dtype=kv_cache_dtype,
    )


def rows(num_tokens: int) -> Tensor:
    return torch.randn(num_tokens, HEADS, D)


def read_all(cache: KVCache, layer: int, request_id: int) -> tuple[Tensor, Tensor]:
    """k, v [s, n_kv, d]"""
    k, v = cache.read(layer, cache.runs(request_id, 0, cache.num_tokens(request_id)))
    return k[:, 0], v[:, 0]


def test_fragmented_blocks_read_as_they_were_written() -> None:
    """Random requests, blocks and lengths against a plain list of rows for each request."""
    draw, cache = random.Random(0), make_cache()
    torch.manual_seed(0)
    free = list(range(16))
    want: dict[int, list[list[Tensor]]] = {}  # request -> layer -> [k; v] rows
    num_runs = set()
    for step in range(400):
        request = draw.randrange(5)
        if draw.random() < 0.15:
            held = cache._tables.get(request)
            free += held.blocks if held else []
            cache.free(request)
            want.pop(request, None)
            continue
        count = draw.choice([0, 1, 1, 3, 9])
        have = cache.num_tokens(request)
        needed = -(-(have + count) // 4) - -(-have // 4)
        if needed > len(free):
            continue
        blocks = [free.pop(draw.randrange(len(free))) for _ in range(needed)]
        cache.grant(request, blocks)
        runs = cache.extend(request, count)
        for layer in range(LAYERS):
            both = [rows(count), rows(count)]
            cache.write(layer, runs, *both)
            old = want.setdefault(request, [[rows(0), rows(0)] for _ in range(LAYERS)])
            old[layer] = [torch.cat(pair) for pair in zip(old[layer], both, strict=True)]
        for owner, layers in want.items():
            num_runs.add(len(cache.runs(owner, 0, cache.num_tokens(owner))))
            for layer, pair in enumerate(layers):
                got = read_all(cache, layer, owner)
                assert torch.equal(got[0], pair[0]) and torch.equal(got[1], pair[1]), f"step {step}"
        assert cache.num_used_blocks == 16 - len(free)
    assert {0, 1, 2, 3} <= num_runs, "nothing was fragmented"


def test_neighbouring_blocks_are_one_run_and_a_view() -> None:
    cache = make_cache()
    cache.grant(7, [5, 6, 2, 3])
    cache.extend(7, 15)
    assert cache.runs(7, 0, 8) == [SlotRun(20, 28)]
    assert cache.runs(7, 3, 15) == [SlotRun(23, 28), SlotRun(8, 15)]
    assert cache.runs(7, 9, 9) == []
    k, _ = cache.read(0, cache.runs(7, 0, 8))
    assert k.shape == (8, 1, HEADS, D)
    assert k.untyped_storage().data_ptr() == cache.layer(0).keys.untyped_storage().data_ptr()


def test_a_full_shard_refuses_and_writes_nothing() -> None:
    cache = make_cache()
    cache.grant(1, [0, 1])
    cache.write(0, cache.extend(1, 6), rows(6), rows(6))
    before = [x.clone() for x in read_all(cache, 0, 1)]
    with pytest.raises(KVCacheFull, match="request 1 needs 9 KV slots .* granted 2 blocks of 4"):
        cache.extend(1, 3)
    with pytest.raises(KVCacheFull, match="request 2 needs 1 KV slots .* granted 0 blocks of 4"):
        cache.extend(2, 1)
    assert (cache.num_tokens(1), cache.num_tokens(2), cache.num_used_blocks) == (6, 0, 2)
    assert all(torch.equal(old, new) for old, new in zip(before, read_all(cache, 0, 1), strict=True))
    assert len(cache.extend(1, 2)) == 1, "what was still free can be used"


def test_a_rank_without_any_token_of_a_request_reads_nothing() -> None:
    cache = make_cache()
    assert cache.extend(3, 0) == [] and cache.num_tokens(3) == 0
    k, v = cache.read(1, cache.runs(3, 0, 0))
    assert k.shape == v.shape == (0, 1, HEADS, D)
    cache.write(1, [], rows(0), rows(0))
    cache.free(3)
    cache.free(99)


def test_freed_blocks_serve_the_next_request() -> None:
    cache = make_cache(num_blocks=1)
    for request in range(3):
        cache.grant(request, [0])
        written = rows(4), rows(4)
        cache.write(0, cache.extend(request, 4), *written)
        assert torch.equal(read_all(cache, 0, request)[0], written[0])
        cache.free(request)
    assert cache.num_used_blocks == 0


def test_bytes_of_a_token_count_k_and_v_of_all_layers() -> None:
    assert make_cache().bytes_per_token == 2 * LAYERS * HEADS * D * 4
    assert make_cache(dtype=torch.bfloat16).bytes_per_token == 2 * LAYERS * HEADS * D * 2


def test_bytes_of_an_fp8_token_are_its_numbers_and_a_scale_for_each_head() -> None:
    cache = make_cache(kv_cache_dtype="fp8")
    assert cache.bytes_per_token == 2 * LAYERS * HEADS * (D + 4)
    held = sum(part.nbytes for layer in range(LAYERS) for part in cache.layer(layer).parts)
    assert held == cache.bytes_per_token * cache.config.tokens_per_rank
    assert cache.element_size == 4, "what travels is as exact as the model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_fp8_cache_reads_what_rounding_each_row_gives(dtype: torch.dtype) -> None:
    """In fragments, and whatever was written beside it."""
    cache = make_cache(dtype=dtype, kv_cache_dtype="fp8")
    assert cache.is_rounded and not make_cache().is_rounded
    cache.grant(1, [5, 2, 9])
    written = [(rows(10).to(dtype), rows(10).to(dtype)) for _ in range(LAYERS)]
    for first, last in ((0, 3), (3, 4), (4, 10)):
        runs = cache.extend(1, last - first)
        for layer, (k, v) in enumerate(written):
            cache.write(layer, runs, k[first:last], v[first:last])
    for layer, both in enumerate(written):
        for found, x in zip(read_all(cache, layer, 1), both, strict=True):
            assert found.dtype == dtype and found.shape == x.shape
            assert torch.equal(found, dequantize(*quantize(x), dtype)) and not torch.equal(found, x)


def test_swapping_keeps_fp8_bytes_and_poison() -> None:
    cache = make_cache(kv_cache_dtype="fp8")
    cache.grant(1, [0, 9])
    runs = cache.extend(1, 6)
    for layer in range(LAYERS):
        k, v = rows(6), rows(6)
        k[4, 1, 2] = torch.nan
        cache.write(layer, runs, k, v)
    before = [read_all(cache, layer, 1) for layer in range(LAYERS)]
    cache.swap_out(1)
    swapped = cache._swapped[1].layers
    assert sum(x.nbytes for layer in swapped for x in layer) == 6 * cache.bytes_per_token
    cache.grant(2, [0, 9])  # Somebody else fills them meanwhile.
    cache.write(0, cache.extend(2, 8), rows(8), rows(8))
    cache.swap_in(1, [12, 5])
    for layer, (k, v) in enumerate(before):
        found = read_all(cache, layer, 1)
        assert torch.equal(found[0].isnan(), k.isnan()) and k.isnan().sum() == D
        assert torch.equal(found[0].nan_to_num(), k.nan_to_num()) and torch.equal(found[1], v)


def test_adopted_blocks_are_read_as_the_beginning_of_the_request_and_not_written() -> None:
    cache = make_cache()
    cache.grant(1, [3, 4])
    written = rows(8), rows(8)
    cache.write(0, cache.extend(1, 8), *written)
    cache.adopt(2, [3, 4])
    cache.grant(2, [7])
    more = rows(2), rows(2)
    runs = cache.extend(2, 2)
    assert runs == [SlotRun(28, 30)], "after what is shared"
    cache.write(0, runs, *more)
    assert torch.equal(read_all(cache, 0, 2)[0], torch.cat([written[0], more[0]]))
    assert (cache.num_tokens(2), cache.num_used_blocks) == (10, 5)
    cache.free(1)
    assert torch.equal(read_all(cache, 0, 2)[1], torch.cat([written[1], more[1]]))


def test_what_was_swapped_out_comes_back_into_other_blocks() -> None:
    cache = make_cache()
    cache.grant(1, [0, 9])
    written = [(rows(6), rows(6)) for _ in range(LAYERS)]
    runs = cache.extend(1, 6)
    for layer, both in enumerate(written):
        cache.write(layer, runs, *both)
    cache.swap_out(1)
    assert (cache.num_tokens(1), cache.num_used_blocks) == (0, 0)
    cache.grant(2, [0, 9])  # Somebody else fills them meanwhile.
    cache.write(0, cache.extend(2, 8), rows(8), rows(8))
    cache.swap_in(1, [12, 5])
    for layer, (k, v) in enumerate(written):
        found = read_all(cache, layer, 1)
        assert torch.equal(found[0], k) and torch.equal(found[1], v)
    assert len(cache.extend(1, 2)) == 1 and cache.num_used_blocks == 4
    cache.swap_out(3)  # A rank may hold nothing of a request.
    cache.swap_in(3, [])
    assert cache.num_tokens(3) == 0
    cache.swap_out(1)
    cache.free(1)
    assert cache._swapped == {}
