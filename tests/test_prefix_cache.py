"""Which blocks hold which prefixes: digests, users, who goes first. With a block manager: what is shared."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from megatron_sps2.config import CacheConfig, KVCacheFull
from megatron_sps2.engine.block_manager import BlockManager
from megatron_sps2.engine.prefix_cache import PrefixCache, chain
from megatron_sps2.parallel.layout import TokenLayout, contiguous, on_one_rank, zigzag

SIZE = 4


def test_a_digest_is_of_a_full_block_and_all_before_it() -> None:
    first = [*chain([1, 2, 3, 4, 5, 6, 7, 8, 9], SIZE)]
    assert len(first) == 2 and len(set(first)) == 2
    assert [*chain([1, 2, 3, 4, 5, 6, 7, 8], SIZE)] == first, "an unfinished block has no digest"
    assert [*chain([1, 2, 3, 4, 5, 6, 7, 0], SIZE)][0] == first[0]
    other = [*chain([0, 2, 3, 4, 5, 6, 7, 8], SIZE)]
    assert not set(other) & set(first), "the second block holds the same tokens, after others"
    assert [*chain([1, 2, 3], SIZE)] == [*chain([], SIZE)] == []
    assert [*chain([12, 3] * 2, 2)] != [*chain([1, 23] * 2, 2)]


def digests(count: int) -> list[bytes]:
    return [*chain(range(count), 1)]


def test_the_longest_known_beginning_is_found_and_only_on_a_home_that_has_it() -> None:
    cache, known = PrefixCache(3), digests(4)
    for digest, place in zip(known, [(0, 7), (1, 2), (0, 3)], strict=False):
        cache.add(digest, place)
    assert cache.find(known, None) == [(0, 7), (1, 2), (0, 3)]
    assert cache.find(known[:1], None) == [(0, 7)] and cache.find(known[1:], 0) == []
    assert cache.find(known, 0) == [(0, 7)], "the second block is elsewhere"
    assert cache.find(known, 2) == []
    cache.add(known[1], (0, 9))
    assert cache.find(known, 0) == [(0, 7), (0, 9), (0, 3)]


def test_a_block_can_be_evicted_when_its_last_user_drops_it_the_longest_unused_first() -> None:
    cache, known = PrefixCache(2), digests(3)
    for block, digest in enumerate(known):
        cache.add(digest, (1, block))
    cache.use((1, 0))
    for block in (0, 2, 1):
        assert cache.drop((1, block)), "it stays, to be found"
    assert cache.num_unused(1) == 2 and cache.num_unused(0) == 0
    assert cache.evict(1) == 2
    assert cache.find(known, None) == [(1, 0), (1, 1)]
    cache.use((1, 1))
    assert cache.num_unused(1) == 0
    cache.drop((1, 1))
    cache.drop((1, 0))
    cache.use((1, 1))
    cache.drop((1, 1))
    assert [cache.evict(1), cache.evict(1)] == [0, 1], "a hit makes a block young again"
    assert cache.find(known, None) == []
    assert not cache.drop((1, 0)), "it is not known any more"


def test_a_block_like_a_known_one_of_the_same_rank_stays_private() -> None:
    cache, (digest,) = PrefixCache(1), digests(1)
    cache.add(digest, (0, 4))
    cache.add(digest, (0, 5))
    assert cache.find([digest], None) == [(0, 4)] and not cache.drop((0, 5)) and cache.drop((0, 4))


# With a block manager.


def manager(num_blocks: int = 8, num_ranks: int = 2) -> BlockManager:
    return BlockManager(CacheConfig(num_blocks=num_blocks, block_size=SIZE), num_ranks, prefix_caching=True)


def prefill(blocks: BlockManager, number: int, ids: Sequence[int], layout: TokenLayout) -> None:
    """All of it, no prefix used, and known from now on."""
    blocks.allocate(number, layout.tokens_per_rank)
    blocks.note_layout(number, 0, layout)
    blocks.publish_prefix(number, ids)


@pytest.mark.parametrize("make", [contiguous, zigzag])
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 16, 23, 24, 41])
def test_only_blocks_of_neighbouring_tokens_are_found_and_all_of_them_with_whole_units(
    num_tokens: int, num_ranks: int, make: type
) -> None:
    ids = list(range(num_tokens))
    blocks = manager(16, num_ranks)
    layout = make(num_tokens, num_ranks, SIZE)
    prefill(blocks, 0, ids, layout)
    assert blocks.num_cached_tokens([*ids, 99], None) == num_tokens // SIZE * SIZE
    found = blocks.adopt_prefix(1, [*ids, 99], None)
    for rank in range(num_ranks):
        # Slots of the tokens of each full block are one block of their rank.
        places = layout.positions(rank)
        whole = [
            places[i : i + SIZE]
            for i in range(0, len(places), SIZE)
            if places[i : i + SIZE] == list(range(places[i], places[i] + SIZE)) and places[i] % SIZE == 0
        ]
        assert len(found[rank]) == len(whole)
        assert blocks.tokens_per_rank(1)[rank] == SIZE * len(whole)


def test_without_whole_units_a_block_of_scattered_tokens_is_not_found() -> None:
    ids = list(range(22))
    blocks = manager(16)
    layout = zigzag(22, 2)
    assert layout.positions(0)[4:8] == [4, 5, 17, 18], "the second block of rank 0"
    prefill(blocks, 0, ids, layout)
    assert blocks.num_cached_tokens([*ids, 99], None) == SIZE
    assert blocks.num_cached_tokens([*range(4, 22), 99], None) == 0


def test_a_rank_that_begins_in_the_middle_of_a_block_shares_nothing_from_there() -> None:
    """A first chunk of 6 tokens, then 10: the second one's blocks are not aligned with the prompt's."""
    ids, blocks = list(range(16)), manager(16, 1)
    for start, count in ((0, 6), (6, 10)):
        layout = on_one_rank(count, 1, 0)
        blocks.allocate(0, layout.tokens_per_rank)
        blocks.note_layout(0, start, layout)
    blocks.publish_prefix(0, ids)
    assert blocks.num_cached_tokens([*ids, 99], None) == SIZE, "tokens 8 to 11 lie in slots 8 to 11 though"


def test_the_last_token_is_always_left_to_compute() -> None:
    ids, blocks = list(range(8)), manager()
    prefill(blocks, 0, ids, contiguous(8, 2, SIZE))
    assert blocks.num_cached_tokens(ids, None) == SIZE
    assert blocks.num_cached_tokens([*ids, 8], None) == 2 * SIZE
    assert blocks.num_cached_tokens(ids[:5], None) == SIZE and blocks.num_cached_tokens(ids[:4], None) == 0


def test_shared_blocks_count_for_each_request_and_are_lost_to_none() -> None:
    ids, blocks = list(range(17)), manager()
    prefill(blocks, 0, ids, contiguous(17, 2, SIZE))
    for number in (1, 2):
        assert blocks.adopt_prefix(number, ids, None) == [[0, 1, 2], [0]]
    assert blocks.num_held_blocks == [9, 4]
    assert blocks.num_free_blocks == [5, 6] and blocks.num_lost_blocks == [0, 0]
    blocks.free(0)
    assert blocks.num_free_blocks == [5, 7], "only the unfinished block went"
    blocks.free(1)
    assert blocks.num_cached_blocks == [0, 0] and blocks.num_free_blocks == [5, 7]
    blocks.free(2)
    assert blocks.num_cached_blocks == [3, 1] and blocks.num_free_blocks == [8, 8]
    assert blocks.num_lost_blocks == [0, 0] and blocks.num_cached_tokens(ids, None) == 16


def test_eviction_gives_room_and_forgets_the_end_of_a_prefix_before_its_beginning() -> None:
    ids, blocks = list(range(17)), manager(6, 1)
    prefill(blocks, 0, ids, on_one_rank(17, 1, 0))
    blocks.free(0)
    assert (blocks.num_free_blocks, blocks.num_cached_blocks) == ([6], [4])
    (granted,) = blocks.allocate(1, [4 * SIZE])
    assert len(set(granted)) == 4 and blocks.num_cached_blocks == [2]
    assert blocks.num_cached_tokens(ids, None) == 2 * SIZE
    with pytest.raises(KVCacheFull, match="needs 3 KV blocks on sp rank 0, 2 of 6"):
        blocks.allocate(2, [3 * SIZE])
    assert blocks.num_cached_tokens(ids, None) == 2 * SIZE, "a refusal evicts nothing"
    used = blocks.adopt_prefix(3, ids, None)
    with pytest.raises(KVCacheFull):
        blocks.allocate(2, [SIZE])
    blocks.free(3)
    assert blocks.allocate(2, [2 * SIZE]) and used and blocks.num_cached_tokens(ids, None) == 0


def test_without_prefix_caching_nothing_is_found() -> None:
    blocks = BlockManager(CacheConfig(num_blocks=8, block_size=SIZE), 1)
    prefill(blocks, 0, range(9), on_one_rank(9, 1, 0))
    assert blocks.num_cached_tokens(range(9), None) == 0 and blocks.adopt_prefix(1, range(9), None) == [[]]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_what_is_found_holds_the_prompt_and_is_written_by_nobody(num_ranks: int) -> None:
    """Random prompts from a few beginnings against a plain record of which tokens each block holds."""
    draw, blocks = random.Random(num_ranks), manager(12, num_ranks)
    written: list[dict[int, list[int]]] = [{} for _ in range(num_ranks)]  # block -> tokens up to its end
    alive, hits = set[int](), 0
    for number in range(600):
        ids = [draw.randrange(2)] * draw.choice([5, 9, 14]) + [draw.randrange(3) for _ in range(5)]
        home = draw.choice([None, *range(num_ranks)])
        found = blocks.adopt_prefix(number, ids, home)
        start = SIZE * sum(map(len, found))
        hits += start
        ends = sorted(len(written[rank][block]) for rank, each in enumerate(found) for block in each)
        assert ends == list(range(SIZE, start + 1, SIZE))
        for rank, each in enumerate(found):
            assert not each or home in (None, rank)
            assert all(ids[: len(written[rank][block])] == written[rank][block] for block in each)
        count = len(ids) - start
        layout = zigzag(count, num_ranks, SIZE) if home is None else on_one_rank(count, num_ranks, home)
        try:
            granted = blocks.allocate(number, layout.tokens_per_rank)
        except KVCacheFull:
            blocks.free(number)
            for other in alive:
                blocks.free(other)
            alive.clear()
            continue
        blocks.note_layout(number, start, layout)
        for rank, new in enumerate(granted):
            shared = {b for other in alive for b in blocks._requests[other][rank].blocks}
            assert not shared & set(new), "a block in use was given away"
            places = layout.positions(rank)
            for i, block in enumerate(new):
                written[rank][block] = ids[: start + places[i * SIZE : (i + 1) * SIZE][-1] + 1]
        blocks.publish_prefix(number, ids)
        alive.add(number)
        if len(alive) > 2:
            blocks.free(gone := draw.choice(sorted(alive)))
            alive.discard(gone)
        assert blocks.num_lost_blocks == [0] * num_ranks
    assert hits > 1000
    for number in alive:
        blocks.free(number)
    assert blocks.num_free_blocks == [12] * num_ranks
