"""CSA's plan against what it means token by token: who holds, reads, probes and sends what."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from megatron_sps2.attention.csa_plan import CsaPlan
from megatron_sps2.csa_setting import CsaSetting
from megatron_sps2.parallel.layout import by_segments, segments_of

SIZE = 16
RANKS = range(1, 9)
# Shorter than a segment, whole ones, fewer segments than ranks, as many, and many that do not divide.
LENGTHS = [1, 7, 16, 17, 40, 64, 100, 128, 131, 256, 300, 515]
# Nothing, less than a segment, a whole one, more than one, more than the whole prompt.
TAILS = [0, 5, 16, 37, 1000]


def plan_of(num_tokens: int, num_ranks: int, **changes: Any) -> CsaPlan:
    return CsaPlan(CsaSetting(segment_size=SIZE, **{"tail": 5, **changes}), num_tokens, num_ranks)


def plans(num_ranks: int, **changes: Any) -> list[CsaPlan]:
    return [plan_of(num_tokens, num_ranks, **changes) for num_tokens in LENGTHS]


@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_segments_are_of_one_size_and_only_the_last_is_shorter(num_tokens: int) -> None:
    segments = segments_of(num_tokens, SIZE)
    assert [segment.start for segment in segments] == list(range(0, num_tokens, SIZE))
    assert [len(segment) for segment in segments[:-1]] == [SIZE] * (len(segments) - 1)
    assert segments[-1].stop == num_tokens and 0 < len(segments[-1]) <= SIZE


@pytest.mark.parametrize("num_ranks", RANKS)
def test_every_token_is_once_on_one_rank_in_whole_segments(num_ranks: int) -> None:
    for num_tokens in LENGTHS:
        layout = by_segments(num_tokens, num_ranks, SIZE)
        held = [layout.positions(rank) for rank in range(num_ranks)]
        assert layout.num_ranks == num_ranks
        assert sorted(itertools.chain(*held)) == list(range(num_tokens))
        assert all(places == sorted(places) for places in held), "rising on every rank"
        rank_of = {place: rank for rank, places in enumerate(held) for place in places}
        assert all(rank_of[place] == rank_of[place - place % SIZE] for place in rank_of)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_ranks_hold_the_same_but_for_two_segments(num_ranks: int) -> None:
    for num_tokens in LENGTHS:
        tokens = by_segments(num_tokens, num_ranks, SIZE).tokens_per_rank
        assert max(tokens) - min(tokens) <= 2 * SIZE
        assert max(tokens) <= -(-num_tokens // num_ranks) + 2 * SIZE, "what the engine's cache is sized for"


def test_with_segments_for_all_each_rank_has_early_and_late_ones() -> None:
    assert plan_of(16 * SIZE, 4).held == [[0, 1, 14, 15], [2, 3, 12, 13], [4, 5, 10, 11], [6, 7, 8, 9]]
    assert plan_of(7 * SIZE, 4).held == [[0, 1], [2, 3], [4, 5], [6]], "contiguous where there are too few"
    assert plan_of(2 * SIZE, 4).held == [[0], [1], [], []]


@pytest.mark.parametrize("num_ranks", RANKS)
def test_owners_are_the_ranks_that_hold_the_segments(num_ranks: int) -> None:
    for plan in plans(num_ranks):
        assert len(plan.owner) == len(plan.segments)
        for segment, owner in enumerate(plan.owner):
            assert plan.layout.find(segment * SIZE)[0] == owner and segment in plan.held[owner]


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("tail", TAILS)
def test_readers_are_segments_with_a_past_and_queries_before_the_tail(num_ranks: int, tail: int) -> None:
    for plan in plans(num_ranks, tail=tail):
        rows = {position // SIZE for position in range(max(0, plan.num_tokens - tail))}
        assert plan.readers == sorted(rows - {0})
        shares = [plan.readers_of(rank) for rank in range(num_ranks)]
        assert sorted(itertools.chain(*shares)) == plan.readers
        assert all(plan.owner[reader] == rank for rank, mine in enumerate(shares) for reader in mine)
        counts = [plan.num_rows(segment) for segment in range(len(plan.segments))]
        assert sum(counts) == max(0, plan.num_tokens - tail) and all(0 <= count <= SIZE for count in counts)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_a_ranks_past_of_a_reader_is_its_tokens_before_it(num_ranks: int) -> None:
    for plan in plans(num_ranks):
        held = [plan.layout.positions(rank) for rank in range(num_ranks)]
        for reader, rank in itertools.product(plan.readers, range(num_ranks)):
            before = [place for place in held[rank] if place < reader * SIZE]
            assert plan.num_past(rank, reader) * SIZE == len(before)
            assert held[rank][: len(before)] == before, "they are its first ones"
            assert plan.concerns(rank, reader) == (bool(before) or plan.owner[reader] == rank)


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize("tail", TAILS)
def test_the_tail_is_the_last_queries_where_they_lie(num_ranks: int, tail: int) -> None:
    for plan in plans(num_ranks, tail=tail):
        first, layout = max(0, plan.num_tokens - tail), plan.tail_layout()
        assert first == plan.first_tail and layout.num_tokens == min(tail, plan.num_tokens)
        for rank in range(num_ranks):
            held = plan.layout.positions(rank)
            mine = [place for place in held if place >= first]
            assert [first + place for place in layout.positions(rank)] == mine
            assert held[len(held) - len(mine) :] == mine, "a rank's last rows"


@pytest.mark.parametrize("tail", TAILS)
def test_probes_are_queries_before_the_tail(tail: int) -> None:
    plan = plan_of(131, 3, tail=tail, num_probes=6)
    for reader in plan.readers:
        probes, count = plan.probes(reader), plan.num_rows(reader)
        assert len(probes) == min(6, count) and probes[-1] == count - 1 and probes[0] >= 0
        assert reader * SIZE + probes[-1] < plan.first_tail


HEADS = {"num_heads": 9, "num_kv_heads": 3, "head_dim": 8, "element_size": 2}
ROW = 8 * 2


def messages(plan: CsaPlan, rank: int, to: int) -> dict[str, int]:
    """Bytes from `rank` to another, from what they hold token by token."""
    held = [plan.layout.positions(r) for r in range(plan.num_ranks)]
    sent = dict.fromkeys(("csa_probes", "csa_sums", "csa_index"), 0)
    for reader in range(1, len(plan.segments)):
        queries = [p for p in range(reader * SIZE, (reader + 1) * SIZE) if p < plan.first_tail]
        if not queries:
            continue
        owner = next(r for r in range(plan.num_ranks) if reader * SIZE in held[r])
        num_probes = min(plan.setting.num_probes, len(queries)) * 9
        past = [sum(p < reader * SIZE for p in places) for places in held]
        if rank == owner and past[to]:
            sent["csa_probes"] += num_probes * ROW
        if (rank == owner or past[rank]) and (to == owner or past[to]):
            sent["csa_sums"] += num_probes * 8
        if to == owner:
            sent["csa_index"] += 3 * past[rank] // 8
    mine, theirs = (sum(p >= plan.first_tail for p in held[r]) for r in (rank, to))
    return sent | {"gather_queries": mine * 9 * ROW, "return_partials": theirs * 9 * (ROW + 4)}


@pytest.mark.parametrize("num_ranks", RANKS)
@pytest.mark.parametrize(("tail", "num_probes"), [(5, 6), (37, 16), (0, 0)])
def test_message_bytes_are_the_sum_of_what_goes_to_each_rank(
    num_ranks: int, tail: int, num_probes: int
) -> None:
    for plan in plans(num_ranks, tail=tail, num_probes=num_probes, selector="strided"):
        for rank in range(num_ranks):
            want = dict.fromkeys(plan.message_bytes(rank, **HEADS), 0)
            for other in {*range(num_ranks)} - {rank}:
                for name, count in messages(plan, rank, other).items():
                    want[name] += count
            assert plan.message_bytes(rank, **HEADS) == want


def test_one_rank_sends_nothing() -> None:
    for num_tokens in LENGTHS:
        assert set(plan_of(num_tokens, 1).message_bytes(0, **HEADS).values()) == {0}
