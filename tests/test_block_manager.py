"""Blocks of all shards against a simple model: none given twice, all come back, a refusal changes nothing."""

from __future__ import annotations

import random
from copy import deepcopy

import pytest

from megatron_sps2.config import CacheConfig, KVCacheFull
from megatron_sps2.engine.block_manager import BlockManager, fill_level


def manager(num_blocks: int = 4, block_size: int = 4, num_ranks: int = 2) -> BlockManager:
    return BlockManager(CacheConfig(num_blocks=num_blocks, block_size=block_size), num_ranks)


class Model:
    """What is granted, kept the simple way."""

    def __init__(self, num_ranks: int) -> None:
        self.blocks: dict[int, list[list[int]]] = {}
        self.tokens: dict[int, list[int]] = {}
        self.num_ranks = num_ranks

    def take(self, request: int, rank: int, blocks: list[int], num_tokens: int) -> None:
        held = self.blocks.setdefault(request, [[] for _ in range(self.num_ranks)])[rank]
        for block in blocks:
            owners = [owner for owner, ranks in self.blocks.items() if block in ranks[rank]]
            assert not owners, f"block {block} of rank {rank} was given to {request} and is held by {owners}"
            held.append(block)
        self.tokens.setdefault(request, [0] * self.num_ranks)[rank] += num_tokens


def snapshot(blocks: BlockManager, requests: range) -> object:
    return deepcopy((blocks._free, [blocks.tokens_per_rank(request) for request in requests]))


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("block_size", [1, 3, 8])
def test_no_block_is_given_twice_and_all_come_back(num_ranks: int, block_size: int) -> None:
    draw, requests = random.Random(num_ranks * 10 + block_size), range(6)
    blocks, model = manager(10, block_size, num_ranks), Model(num_ranks)
    refusals = 0
    for _ in range(1500):
        request, before = draw.choice(requests), snapshot(blocks, requests)
        try:
            match draw.choice(["allocate", "append", "append", "append", "free"]):
                case "allocate":
                    more = [draw.randrange(3 * block_size) for _ in range(num_ranks)]
                    for rank, new in enumerate(blocks.allocate(request, more)):
                        model.take(request, rank, list(new), more[rank])
                case "append" if request in model.blocks:
                    rank, block = blocks.append(request)
                    model.take(request, rank, [] if block is None else [block], 1)
                case "free" if draw.random() < 0.4:
                    blocks.free(request)
                    model.blocks.pop(request, None)
                    model.tokens.pop(request, None)
        except KVCacheFull:
            refusals += 1
            assert snapshot(blocks, requests) == before, "a refusal changed something"
        for owner, tokens in model.tokens.items():
            assert blocks.tokens_per_rank(owner) == tokens
            held = [len(found) for found in model.blocks[owner]]
            assert blocks.blocks_per_rank(owner) == held == [-(-count // block_size) for count in tokens]
        used = [sum(len(ranks[rank]) for ranks in model.blocks.values()) for rank in range(num_ranks)]
        assert blocks.num_free_blocks == [10 - count for count in used]
        assert all(free == sorted(set(free)) for free in blocks._free)
    assert refusals > 20, "the cache was never full"
    for request in requests:
        blocks.free(request)
    assert blocks.num_free_blocks == [10] * num_ranks


def test_a_new_token_goes_to_the_emptiest_shard() -> None:
    blocks = manager(num_ranks=3)
    blocks.allocate(0, [3, 1, 2])
    ranks = [blocks.append(0)[0] for _ in range(6)]
    assert blocks.tokens_per_rank(0) == [4, 4, 4]
    assert sorted(ranks[:3]) == [1, 1, 2]


def test_of_equally_full_shards_the_one_with_more_room_takes_the_token() -> None:
    blocks = manager()
    blocks.allocate(9, [8, 0])
    blocks.allocate(0, [4, 4])
    assert blocks.append(0) == (1, 1)


def test_a_full_shard_is_passed_over_until_none_has_room() -> None:
    blocks = manager(num_blocks=2, block_size=2)
    blocks.allocate(9, [0, 4])
    blocks.allocate(0, [1, 0])
    assert [blocks.append(0)[0] for _ in range(3)] == [0, 0, 0]
    with pytest.raises(KVCacheFull, match="request 0 needs one more .* hold 8 tokens"):
        blocks.append(0)
    assert blocks.tokens_per_rank(0) == [4, 0]


def test_capacity_is_the_sum_over_ranks() -> None:
    blocks = manager(num_blocks=4, block_size=4, num_ranks=3)
    assert blocks.capacity == 48
    blocks.allocate(0, [15, 15, 15])  # One shard alone holds 16.
    for _ in range(3):
        blocks.append(0)
    assert sum(blocks.tokens_per_rank(0)) == 48
    with pytest.raises(KVCacheFull):
        blocks.append(0)


def test_a_short_shard_is_named() -> None:
    blocks = manager()
    with pytest.raises(KVCacheFull, match="request 3 needs 5 KV blocks on sp rank 1, 4 of 4 are free; raise"):
        blocks.allocate(3, [4, 17])
    assert blocks.num_free_blocks == [4, 4] and blocks.tokens_per_rank(3) == [0, 0]


def test_blocks_are_neighbours_where_they_can_be() -> None:
    blocks = manager(num_blocks=8, num_ranks=1)
    assert blocks.allocate(0, [8]) == ((0, 1),)
    assert blocks.allocate(1, [4]) == ((2,),)
    assert blocks.allocate(2, [4]) == ((3,),)
    blocks.free(1)
    assert blocks.allocate(3, [8]) == ((4, 5),), "the hole of one block was used though two fit elsewhere"
    assert blocks.allocate(0, [4]) == ((2,),), "the block after the request's last one was free"
    assert blocks.append(3) == (0, 6)


def test_freeing_an_unknown_request_does_nothing() -> None:
    blocks = manager()
    blocks.free(5)
    assert blocks.num_free_blocks == [4, 4]


def test_fill_level_is_what_pouring_token_by_token_gives() -> None:
    draw = random.Random(1)
    for _ in range(300):
        tokens = [draw.randrange(12) for _ in range(draw.randrange(1, 6))]
        poured, level, num_appended = list(tokens), 0, draw.randrange(25)
        for _ in range(num_appended):
            emptiest = poured.index(min(poured))
            poured[emptiest] += 1
            level = max(level, poured[emptiest])
        got = fill_level(tokens, num_appended)
        assert got == level or max(got, *tokens) == max(level, *tokens), (tokens, num_appended)


def test_most_blocks_is_never_passed_and_nearly_reached() -> None:
    draw = random.Random(2)
    for _ in range(200):
        num_ranks, block_size = draw.randrange(1, 5), draw.randrange(1, 5)
        blocks = manager(100, block_size, num_ranks)
        blocks.allocate(0, [draw.randrange(9) for _ in range(num_ranks)])
        more, num_appended = [draw.randrange(9) for _ in range(num_ranks)], draw.randrange(30)
        bound = blocks.most_blocks(0, more, num_appended)
        blocks.allocate(0, more)
        for _ in range(num_appended):
            blocks.append(0)
        held = blocks.blocks_per_rank(0)
        assert all(0 <= most - count <= 1 for most, count in zip(bound, held, strict=True))
        assert max(bound) == max(held)


def test_a_token_goes_home_while_home_has_room() -> None:
    blocks = manager(num_blocks=2)
    blocks.allocate(0, [6, 0])
    assert [blocks.append(0, home=0)[0] for _ in range(4)] == [0, 0, 1, 1]
    assert blocks.append(0, home=None) == (1, None)


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_what_is_swapped_out_comes_back_in_as_many_blocks_when_there_is_room(prefix_caching: bool) -> None:
    config = CacheConfig(num_blocks=4, block_size=4)
    blocks = BlockManager(config, 2, prefix_caching=prefix_caching)
    blocks.allocate(0, [9, 4])
    blocks.append(0)
    blocks.swap_out(0)
    assert blocks.num_free_blocks == [4, 4] and blocks.holders == set()
    blocks.allocate(1, [8, 0])
    assert blocks.swap_in(0, spare=0) is None, "rank 0 has 2 blocks and 3 are needed"
    blocks.free(1)
    blocks.allocate(1, [1, 1])
    assert blocks.swap_in(0, spare=1) is None and blocks.tokens_per_rank(0) == [0, 0]
    granted = blocks.swap_in(0, spare=0)
    assert granted is not None and [len(each) for each in granted] == [3, 2]
    assert blocks.tokens_per_rank(0) == [9, 5]
    blocks.swap_out(0)
    blocks.free(0)
    blocks.allocate(0, [1, 0])
    assert blocks.tokens_per_rank(0) == [1, 0], "nothing is left of what was freed in host memory"


def test_a_lost_block_is_counted() -> None:
    blocks = manager()
    blocks.allocate(0, [5, 1])
    assert blocks.num_held_blocks == [2, 1] and blocks.num_lost_blocks == [0, 0]
    blocks._free[1].pop()
    assert blocks.num_lost_blocks == [0, 1]
