"""Where tokens and heads live: nothing twice, nothing left out, level. Integers against brute force."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from math import ceil

import pytest

from megatron_sps2.parallel.layout import TokenLayout, contiguous, cut, on_one_rank, split_heads, zigzag

RANKS = range(1, 9)
LENGTHS = [*range(40), 257, 1000]


@pytest.mark.parametrize("make", [contiguous, zigzag])
@pytest.mark.parametrize("num_ranks", RANKS)
def test_every_token_lives_once_and_ranks_hold_alike(
    make: Callable[[int, int], TokenLayout], num_ranks: int
) -> None:
    for num_tokens in LENGTHS:
        layout = make(num_tokens, num_ranks)
        held = [layout.positions(rank) for rank in range(num_ranks)]
        assert sorted(sum(held, [])) == list(range(num_tokens))
        assert [len(positions) for positions in held] == layout.tokens_per_rank
        assert max(layout.tokens_per_rank) - min(layout.tokens_per_rank) <= 1
        assert (layout.num_ranks, layout.num_tokens) == (num_ranks, num_tokens)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_contiguous_ranks_are_neighbours_in_order(num_ranks: int) -> None:
    layout = contiguous(50, num_ranks)
    assert sum((layout.positions(rank) for rank in range(num_ranks)), []) == list(range(50))


def causal_work(layout: TokenLayout) -> list[int]:
    """Keys seen by all queries of each rank."""
    return [sum(p + 1 for p in layout.positions(rank)) for rank in range(layout.num_ranks)]


@pytest.mark.parametrize("num_ranks", RANKS)
def test_zigzag_balances_causal_work_and_contiguous_does_not(num_ranks: int) -> None:
    for num_tokens in (1000, 1003, 1023):
        work = causal_work(zigzag(num_tokens, num_ranks))
        # Segments differ by a token, and a rank's share is 125 tokens or more here.
        assert max(work) < 1.03 * min(work)
    even = causal_work(zigzag(num_ranks * 2 * 30, num_ranks))
    assert len(set(even)) == 1
    if num_ranks > 1:
        uneven = causal_work(contiguous(num_ranks * 2 * 30, num_ranks))
        assert max(uneven) > 2 * min(uneven)


@pytest.mark.parametrize("make", [contiguous, zigzag])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_slabs_bring_the_rank_order_into_order_of_position(
    make: Callable[[int, int], TokenLayout], num_ranks: int
) -> None:
    for num_tokens in LENGTHS:
        layout = make(num_tokens, num_ranks)
        by_rank = sum((layout.positions(rank) for rank in range(num_ranks)), [])
        slabs = [by_rank[slab.offset : slab.offset + len(slab.segment)] for slab in layout.slabs()]
        assert sum(slabs, []) == list(range(num_tokens))


@pytest.mark.parametrize("make", [contiguous, zigzag])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5])
def test_find_names_rank_and_index_of_every_position(
    make: Callable[[int, int], TokenLayout], num_ranks: int
) -> None:
    for num_tokens in (1, 2, 7, 40):
        layout = make(num_tokens, num_ranks)
        for position in range(num_tokens):
            rank, index = layout.find(position)
            assert layout.positions(rank)[index] == position
        for outside in (-1, num_tokens):
            with pytest.raises(IndexError, match=f"position {outside} .* layout of {num_tokens} tokens"):
                layout.find(outside)


def test_cut_puts_longer_parts_first() -> None:
    assert [len(part) for part in cut(10, 4)] == [3, 3, 2, 2]
    assert [len(part) for part in cut(2, 4)] == [1, 1, 0, 0]


HEADS = [(9, 3), (9, 9), (9, 1), (8, 2), (8, 8), (32, 8), (6, 6), (4, 1), (15, 5), (1, 1), (64, 8)]


@pytest.mark.parametrize(("n", "n_kv"), HEADS)
@pytest.mark.parametrize("num_ranks", RANKS)
def test_every_query_head_lives_once_with_the_kv_head_it_reads(n: int, n_kv: int, num_ranks: int) -> None:
    if n < num_ranks:
        with pytest.raises(
            ValueError, match=f"^{n} query heads .* sp_size={num_ranks}; .*pass_kv, or sp_size at most {n}$"
        ):
            split_heads(n, n_kv, num_ranks)
        return
    split = split_heads(n, n_kv, num_ranks)
    assert len(split) == num_ranks and all(split), "a rank has no head"
    covered = [
        (head, group.kv_head)
        for held in split
        for group in held
        for head in range(group.q_start, group.q_stop)
    ]
    assert covered == [(head, head // (n // n_kv)) for head in range(n)]
    for held in split:
        kv_heads = [group.kv_head for group in held]
        assert kv_heads == list(range(kv_heads[0], kv_heads[0] + len(held))), "KV heads are not neighbours"
    everywhere = [group.kv_head for held in split for group in held]
    if n_kv >= num_ranks:
        assert everywhere == list(range(n_kv)), "a KV head crosses the wire twice"
    queries = [sum(group.num_queries for group in held) for held in split]
    assert max(queries) - min(queries) <= (n // n_kv if n_kv >= num_ranks else 1)


def test_nine_heads_split_as_smollm2_needs_it() -> None:
    def sizes(n: int, n_kv: int, num_ranks: int) -> list[int]:
        return [sum(group.num_queries for group in held) for held in split_heads(n, n_kv, num_ranks)]

    assert sizes(9, 3, 2) == [6, 3]
    assert sizes(9, 3, 4) == [3, 2, 2, 2]
    assert sizes(9, 9, 2) == [5, 4]
    assert sizes(9, 9, 4) == [3, 2, 2, 2]


@pytest.mark.parametrize("make", [contiguous, zigzag])
def test_ranks_hold_whole_units_and_differ_by_one(make: Callable[[int, int, int], TokenLayout]) -> None:
    for num_tokens, num_ranks, unit in itertools.product((0, 1, 5, 16, 33, 100), (1, 2, 3, 5), (1, 4, 7)):
        layout = make(num_tokens, num_ranks, unit)
        places = [place for rank in range(num_ranks) for place in layout.positions(rank)]
        assert sorted(places) == list(range(num_tokens))
        ends = {segment.stop for held in layout.segments for segment in held} - {num_tokens}
        assert all(end % unit == 0 for end in ends)
        units = [-(-count // unit) for count in layout.tokens_per_rank]
        assert max(units) - min(units) <= 1 and max(units) == ceil(ceil(num_tokens / unit) / num_ranks)


def test_a_turned_layout_gives_each_rank_what_another_had() -> None:
    layout = zigzag(11, 3)
    for turn in range(7):
        turned = layout.turned(turn)
        assert all(turned.positions((rank + turn) % 3) == layout.positions(rank) for rank in range(3))
    assert layout.turned(0) == layout.turned(3) == layout


def test_a_prompt_on_one_rank_is_on_no_other() -> None:
    assert on_one_rank(9, 3, 1).tokens_per_rank == [0, 9, 0]
    assert on_one_rank(9, 3, 1).find(4) == (1, 4)
