"""The scheduler's plans, without a model: turns, order, room, preemption, aborts. Pure Python on rank 0."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest

from megatron_sps2.config import KVCacheFull
from megatron_sps2.engine.homes import assign_homes
from megatron_sps2.engine.request import FinishReason, Request
from tests.desk import BLOCK, NUM_LAYERS, VOCAB_SIZE, Desk, kind

POLICIES = ("sps2", "sarathi", "fcfs")


def test_prefill_pieces_and_decodes_take_turns() -> None:
    desk = Desk(layers_per_piece=1)
    desk.add(0, 3, 6)
    desk.add(1, 3, 2)
    assert [kind(plan) for plan in desk.run()] == [
        *("p0:0-1", "p0:1-2", "p0:2-3", "p0:3-4"),
        *("d0", "p1:0-1", "d0", "p1:1-2", "d0", "p1:2-3", "d0", "p1:3-4"),
        *("d01", "-"),
    ]


def test_a_piece_may_hold_several_layers_and_the_last_one_what_is_left() -> None:
    desk = Desk(layers_per_piece=3)
    desk.add(0, 3, 1)
    plans = desk.run()
    assert [kind(plan) for plan in plans] == ["p0:0-3", "p0:3-4", "-"]
    (first,), (second,) = plans[0].pieces, plans[1].pieces
    assert first.prompt and second.prompt is None and second.blocks == ()


@pytest.mark.parametrize("policy", POLICIES)
def test_first_come_first_served_and_never_more_than_max_num_seqs(policy: str) -> None:
    desk = Desk(num_blocks=100, policy=policy, max_num_seqs=3)
    for i in range(8):
        desk.add(i, 2 + i % 3, 20 + (5 * i) % 7)
        desk.now += 100  # Longer than a prefill takes: no shorter one may pass.
    order, largest = list[int](), 0
    while desk.scheduler.has_work:
        plan = desk.step()
        largest = max(largest, len(plan.decode))
        order += [piece.request_id for piece in plan.pieces if piece.prompt]
    assert (order, largest) == (list(range(8)), 3)
    assert all(request.finish_reason is FinishReason.LENGTH for request in desk.requests.values())
    desk.check_empty()


# Room.


def test_a_new_request_leaves_the_watermark_free_while_others_run() -> None:
    def steps_until_started(watermark: float) -> int:
        desk = Desk(num_blocks=10, sp_size=1, watermark=watermark, layers_per_piece=NUM_LAYERS)
        desk.add(0, 3 * BLOCK, 20)
        second = desk.add(1, 5 * BLOCK, 1)  # when the first one has a token, 6 blocks are free
        for count in range(100):
            if second.started_at is not None:
                return count
            desk.step()
        return 100

    assert steps_until_started(0.0) == 3, "there was room at once"
    assert steps_until_started(0.1) == 3, "one block stays free"
    assert steps_until_started(0.3) > 19, "three blocks would not stay free before the first one ended"


def test_a_request_that_runs_alone_needs_no_watermark() -> None:
    desk = Desk(num_blocks=4, sp_size=1, watermark=0.9)
    request = desk.add(0, 4 * BLOCK - 2, 3)
    desk.run()
    assert request.finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("preemption", ["recompute", "swap"])
def test_the_youngest_makes_room_and_comes_back_when_there_is_some(preemption: str) -> None:
    desk = Desk(num_blocks=5, sp_size=1, max_num_seqs=3, preemption=preemption, policy="fcfs")
    requests = [desk.add(i, 3, 8 - i) for i in range(3)]  # 10 tokens at last: 3 blocks each
    plans = desk.run()
    counts = [request.num_preemptions for request in requests]
    assert counts[0] == 0 and counts[2] > 0, "the oldest went, or nobody"
    assert [len(request.output) for request in requests] == [8, 7, 6]
    assert sum(counts) == desk.scheduler.counters.num_preemptions
    again = [piece for plan in plans for piece in plan.pieces if piece.prompt and piece.prompt.num_generated]
    out = [number for plan in plans for number in plan.swapped_out]
    back = [number for plan in plans for number, _ in plan.swapped_in]
    if preemption == "swap":
        assert not again and out and sorted(out) == sorted(back) and len(out) == sum(counts)
    else:
        assert not out and [piece.request_id for piece in again] and len(again) == sum(counts)
    for piece in again:
        prompt, request = piece.prompt, desk.requests[piece.request_id]
        assert prompt and prompt.token_ids == request.token_ids[: 3 + prompt.num_generated]
    desk.check_empty()


def test_a_prefill_is_sent_back_and_begins_anew() -> None:
    desk = Desk(num_blocks=4, sp_size=1, layers_per_piece=1)
    desk.add(0, 5, 8)
    young = desk.add(1, 5, 1)
    kinds = [kind(plan) for plan in desk.run()]
    assert young.num_preemptions == 1 and young.finish_reason is FinishReason.LENGTH
    assert kinds.count("p1:0-1") == 2 and kinds.count("p1:3-4") == 1
    desk.check_empty()


def test_a_swapped_request_comes_before_those_that_wait_and_the_oldest_first() -> None:
    desk = Desk(num_blocks=6, sp_size=1, max_num_seqs=3, policy="fcfs", preemption="swap")
    requests = [desk.add(i, 7, 9) for i in range(3)]
    late = desk.add(3, 1, 1)
    came_back = [i for plan in desk.run() for i, _ in plan.swapped_in]
    assert came_back[-2:] == sorted(came_back[-2:]) and requests[1].num_preemptions
    ends = [request.token_times[-1] for request in requests]
    assert ends == sorted(ends) and late.started_at is not None and late.started_at > 0
    desk.check_empty()


def test_what_must_go_in_the_step_of_its_return_stays_in_host_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(num_blocks=5, sp_size=1, max_num_seqs=3, policy="fcfs", preemption="swap")
    for i in range(3):
        desk.add(i, 3, 8 - i)
    went: list[bool] = []
    swap_out = desk.scheduler._room.swap_out
    monkeypatch.setattr(
        desk.scheduler._room, "swap_out", lambda number: went.append(swap_out(number)) or went[-1]
    )
    plans = desk.run()
    out = [number for plan in plans for number in plan.swapped_out]
    back = [number for plan in plans for number, _ in plan.swapped_in]
    assert not all(went), "no return was ever taken back"
    assert sorted(out) == sorted(back) and len(out) == sum(went) == desk.scheduler.counters.num_preemptions
    assert not any(set(plan.swapped_out) & {number for number, _ in plan.swapped_in} for plan in plans)
    desk.check_empty()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("preemption", ["recompute", "swap"])
@pytest.mark.parametrize("prefix_caching", [False, True])
def test_no_mixture_of_requests_gets_stuck_or_overflows(
    policy: str, preemption: str, prefix_caching: bool
) -> None:
    """Arrivals, aborts, early ends and turns onto kept caches, in caches that hold two or three requests."""
    counts = [
        Mixture(seed, policy=policy, preemption=preemption, prefix_caching=prefix_caching).play()
        for seed in range(24)
    ]
    num_preemptions, num_turns, num_hits = (sum(each) for each in zip(*counts, strict=True))
    assert num_preemptions > 20 and num_turns > 5 and (num_hits > 0) == prefix_caching


class Mixture:
    """A random user of a small engine."""

    def __init__(self, seed: int, **schedule: Any) -> None:
        self.draw = draw = random.Random(seed)
        self.desk = Desk(
            num_blocks=draw.randrange(4, 8),
            sp_size=1 + seed % 4,
            max_num_seqs=4,
            layers_per_piece=draw.choice([1, 4, None]),
            short_prompt_tokens=draw.choice([0, 7, 20]),
            max_num_batched_tokens=draw.choice([4, 9, 16, 100]),
            watermark=draw.choice([0, 0.2]),
            cost=lambda plan: draw.random(),
            **schedule,
        )
        self.longest = self.desk.blocks.capacity // 2  # so that a kept cache can be continued
        self.kept: dict[int, Request] = {}
        self.num_turns = 0

    def play(self) -> tuple[int, int, int]:
        for request_id in range(30):
            self._add(request_id)
            for _ in range(self.draw.randrange(12)):
                self._step()
            if self.draw.random() < 0.2:
                self._end_one()
            if self.draw.random() < 0.4:
                self._continue_one()
        while self.desk.scheduler.has_work or self.kept:
            if not self.desk.scheduler.has_work:
                self._release_one()
            self._step(keep_cache=False)
            assert self.desk.scheduler.counters.num_steps < 5000, "stuck"
        self.desk.check_empty()
        ends = {request.finish_reason for request in self.desk.requests.values()}
        assert None not in ends and FinishReason.LENGTH in ends
        counters = self.desk.scheduler.counters
        return counters.num_preemptions, self.num_turns, counters.prefix_hits

    def _add(self, request_id: int) -> None:
        length, first = self.draw.randrange(1, self.longest), self.draw.randrange(3)
        prompt = [first] * (length - 1) + [self.draw.randrange(VOCAB_SIZE)]
        try:
            self.desk.add(request_id, prompt, self.draw.randrange(1, self.longest))
        except ValueError:
            assert self.desk.scheduler._policy.chunked, "half of the cache is room for anyone"

    def _step(self, keep_cache: bool | None = None) -> None:
        desk, keep = self.desk, self.draw.random() < 0.1 if keep_cache is None else keep_cache
        before = {i for i, request in desk.requests.items() if request.finish_reason is None}
        try:
            desk.step(keep)
        except KVCacheFull:
            assert self.kept, "nobody keeps a cache"
            return self._release_one()
        turns = [i for i, request in desk.requests.items() if request.num_past and i in before]
        for request in desk.scheduler.failed:
            assert self.kept or turns, f"{request.request_id} failed though nobody kept a cache"
        desk.scheduler.failed.clear()
        if keep:
            ended = {i for i in before if desk.requests[i].finish_reason is FinishReason.LENGTH}
            self.kept.update((i, desk.requests[i]) for i in ended)
        return None

    def _end_one(self) -> None:
        """An abort, or a stop string: anywhere in its life."""
        alive = [request for request in self.desk.requests.values() if request.finish_reason is None]
        if not alive:
            return
        request = self.draw.choice(alive)
        if self.draw.random() < 0.5 and request.output:
            request.finish_reason = FinishReason.STOP
            self.desk.scheduler.release(request, keep_cache=True)
            self.desk.scheduler.release(request)
        else:
            self.desk.scheduler.abort(request.request_id)
            assert request.finish_reason is FinishReason.ABORT

    def _release_one(self) -> None:
        number = self.draw.choice(list(self.kept))
        self.desk.scheduler.release(self.kept.pop(number))

    def _continue_one(self) -> None:
        if not self.kept:
            return
        number = self.draw.choice(list(self.kept))
        request = self.kept[number]
        past = sum(self.desk.blocks.tokens_per_rank(number))
        assert past == request.num_tokens - 1
        prompt = [request.output_ids[-1], *[5] * self.draw.randrange(4)]
        try:
            self.desk.add(number, prompt, self.draw.randrange(1, 9), num_past=past)
        except ValueError:
            self._release_one()
        else:
            self.num_turns += 1
            del self.kept[number]


@pytest.mark.parametrize("policy", POLICIES)
def test_chunks_and_turns_keep_the_shards_level(policy: str) -> None:
    """With few blocks a chunk some ranks get more of it; not the same ones each time."""
    desk = Desk(num_blocks=12, sp_size=3, policy=policy, max_num_batched_tokens=BLOCK, prefix_caching=True)
    request = desk.add(0, 30 * BLOCK, 2)
    while request.finish_reason is None:
        desk.step(keep_cache=True)
    held = desk.blocks.blocks_per_rank(0)
    assert max(held) - min(held) <= 1
    for turn in range(3):
        request = desk.add(0, [request.output_ids[-1]], 1, num_past=30 * BLOCK + 1 + turn)
        while request.finish_reason is None:
            desk.step(keep_cache=True)
    assert max(held := desk.blocks.tokens_per_rank(0)) - min(held) <= BLOCK


def test_a_prefix_that_leaves_no_room_is_not_used() -> None:
    """Others filled one rank with it; spread anew the whole prompt fits."""
    desk = Desk(num_blocks=6, sp_size=2, prefix_caching=True, short_prompt_tokens=20)
    desk.add(0, [1] * 20, 1)
    desk.run()
    assert desk.blocks.num_cached_blocks == [5, 0]
    long = desk.add(1, [1] * 20 + [2] * 26, 1)
    desk.run()
    assert long.finish_reason is FinishReason.LENGTH and long.num_cached == 0
    desk.check_empty()


def test_a_turn_does_not_pass_for_the_beginning_of_a_conversation() -> None:
    """Where a first turn's blocks are not known to the prefix cache, the second must not be found there."""
    desk = Desk(num_blocks=20, sp_size=1, policy="fcfs", prefix_caching=True)
    twins = [desk.add(i, [1] * 9, 1) for i in range(2)]
    desk.step(keep_cache=True)
    assert twins[1].finish_reason is FinishReason.LENGTH
    more = [twins[1].output_ids[0], *[2] * 8]
    turn = desk.add(1, more, 1, num_past=9)
    while turn.finish_reason is None:
        desk.step(keep_cache=True)
    stranger = desk.add(2, more, 1)
    desk.run()
    assert stranger.num_cached == 0 and stranger.finish_reason is FinishReason.LENGTH


def test_a_chunk_that_finds_no_room_at_first_is_told_to_the_ranks_when_it_gets_some() -> None:
    """Looked at, there was room for both prompts; the running request took a block of it before them."""
    desk = Desk(num_blocks=5, sp_size=1, policy="sarathi", max_num_seqs=3, watermark=0)
    old = desk.add(0, 2 * BLOCK, 4)
    desk.step()
    desk.add(1, 3 * BLOCK, 1)
    kinds = [kind(plan) for plan in desk.run()]
    assert kinds[:3] == ["d0", "d0", "d0"] and "p1:0-4" in kinds[3] and old.num_preemptions == 0
    desk.check_empty()


# Kept caches.


def test_caches_kept_of_finished_requests_count_as_taken() -> None:
    desk = Desk(num_blocks=4)
    old = desk.add(0, 20, 1)  # 3 of 4 blocks on each rank
    desk.step(keep_cache=True)
    while old.finish_reason is None:
        desk.step(keep_cache=True)
    assert old.finish_reason is FinishReason.LENGTH and desk.blocks.num_free_blocks == [1, 1]
    first = desk.add(1, 2, 1)
    while first.finish_reason is None:
        desk.step()
    desk.add(2, 10, 1)
    desk.step()
    with pytest.raises(
        KVCacheFull, match=r"request 2 needs 2 KV blocks .* keep the cache; release one of \[0\]"
    ):
        desk.step()
    desk.scheduler.release(old)
    plan = desk.step()
    assert (kind(plan)[:2], set(plan.freed)) == ("p2", {0})


def test_a_turn_onto_a_kept_cache_needs_only_what_is_new() -> None:
    desk = Desk(num_blocks=4)
    request = desk.add(0, 20, 1)
    while request.finish_reason is None:
        desk.step(keep_cache=True)
    desk.add(0, 9, 4, num_past=20)  # 32 tokens, all that fits
    (piece,) = desk.step().pieces
    assert piece.prompt and (piece.strategy, piece.start, piece.prompt.num_past) == ("pass_q", 20, 20)
    assert [len(blocks) for blocks in piece.blocks] == [1, 1]
    desk.run()
    desk.check_empty()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_turn_that_must_make_room_is_swapped_as_its_past_cannot_be_computed_again(policy: str) -> None:
    desk = Desk(num_blocks=6, sp_size=1, policy=policy)
    first = desk.add(1, 4, 1)
    while first.finish_reason is None:
        desk.step(keep_cache=True)
    old = desk.add(0, 4, 13)
    desk.now += 1
    turn = desk.add(1, 4, 12, num_past=4)
    plans = []
    while desk.scheduler.has_work:
        plans.append(desk.step())
    assert turn.num_preemptions == 1 and [plan.swapped_out for plan in plans if plan.swapped_out] == [(1,)]
    assert old.num_preemptions == 0
    assert {old.finish_reason, turn.finish_reason} == {FinishReason.LENGTH}
    desk.check_empty()


def test_an_older_request_is_not_failed_while_a_prefilling_turn_holds_the_rest() -> None:
    desk = Desk(num_blocks=6, sp_size=1, layers_per_piece=1)
    first = desk.add(1, 8, 1)
    while first.finish_reason is None:
        desk.step(keep_cache=True)
    old = desk.add(0, 6, 6)
    while not old.output:
        desk.step()
    desk.now += 1
    turn = desk.add(1, 8, 1, num_past=8)
    desk.run()
    assert old.num_preemptions and {old.finish_reason, turn.finish_reason} == {FinishReason.LENGTH}
    desk.check_empty()


def test_a_request_that_can_never_get_room_ends_with_an_error() -> None:
    desk = Desk(num_blocks=4, sp_size=1)
    kept = desk.add(0, 9, 1)
    while kept.finish_reason is None:
        desk.step(keep_cache=True)
    request = desk.add(1, 3, 8)
    for _ in range(20):
        desk.step()
    assert desk.scheduler.failed == [request] and request.finish_reason is FinishReason.ERROR
    assert request.error and "needs one more KV block" in request.error and len(request.output) == 2
    assert not desk.scheduler.has_work
    desk.scheduler.release(kept)
    desk.run()
    desk.check_empty()


# Ends.


@pytest.mark.parametrize("state", ["waiting", "prefilling", "running", "swapped", "sent back"])
def test_an_abort_frees_the_blocks_in_every_state(state: str) -> None:
    preemption = "swap" if state == "swapped" else "recompute"
    desk = Desk(num_blocks=5, sp_size=1, layers_per_piece=1, preemption=preemption, max_num_seqs=3)
    old = desk.add(9, 5, 9)
    desk.now += 1
    request = desk.add(0, 5, 9)
    reached = {
        "waiting": lambda: request in desk.scheduler.waiting,
        "prefilling": lambda: any(each.request is request for each in desk.scheduler.prefilling),
        "running": lambda: request in desk.scheduler.running,
        "swapped": lambda: request in desk.scheduler.swapped,
        "sent back": lambda: request.num_preemptions and request in desk.scheduler.waiting,
    }[state]
    for _ in range(50):
        if reached():
            break
        desk.step()
    assert reached(), "the state was never reached"
    desk.scheduler.abort(0)
    assert request.finish_reason is FinishReason.ABORT and 0 not in desk.blocks.holders
    plans = desk.run()
    assert 0 in plans[0].freed and not any("0" in kind(plan).split(":")[0] for plan in plans)
    assert old.finish_reason is FinishReason.LENGTH
    desk.scheduler.abort(0)
    desk.scheduler.abort(99)
    assert not desk.scheduler.has_work
    desk.check_empty()


def test_a_request_larger_than_the_empty_cache_is_refused() -> None:
    desk = Desk(num_blocks=4)
    desk.add(0, 16, 17)  # 32 tokens in the cache: the last one is never fed.
    with pytest.raises(
        ValueError, match="grow to 5 KV blocks of 4 tokens on an sp rank, and each has 4; raise"
    ):
        desk.add(1, 16, 18)
    assert [kind(plan) for plan in desk.run()].count("d0") == 16
    assert 1 not in desk.requests


def test_a_strategy_that_cannot_serve_a_request_is_refused_when_it_is_added() -> None:
    with pytest.raises(ValueError, match="4 query heads .* cannot be spread over sp_size=5"):
        Desk(sp_size=5, strategy="ulysses").add(0, 4, 4)
    with pytest.raises(ValueError, match="strategy='pass_kv' cannot .* policy 'sarathi' cuts prompts"):
        Desk(strategy="pass_kv", policy="sarathi")
    desk = Desk(strategy="pass_kv")
    request = desk.add(0, 8, 1)
    while request.finish_reason is None:
        desk.step(keep_cache=True)
    with pytest.raises(ValueError, match="strategy='pass_kv' cannot prefill onto a cached context"):
        desk.add(0, 4, 1, num_past=8)


def test_the_plan_holds_layout_blocks_and_positions() -> None:
    desk = Desk(strategy="ulysses", layers_per_piece=NUM_LAYERS)
    desk.add(0, 5, 3)
    (piece,) = desk.step().pieces
    assert piece.prompt and desk.scheduler.last_strategy == piece.strategy == "ulysses"
    assert (piece.start, piece.stop, piece.blocks, piece.home) == (0, 5, ((0,), (0,)), None)
    assert desk.blocks.tokens_per_rank(0) == [3, 2]
    (token,) = desk.step().decode
    assert (token.token_id, token.position, token.kv_rank, token.home) == (0, 5, 1, 1)
    assert token.new_block is None and token.spread


def test_homes_are_balanced_and_where_the_kv_is_kept_when_possible() -> None:
    draw = random.Random(0)
    for _ in range(500):
        num_ranks = draw.randrange(1, 6)
        kv_ranks = [draw.randrange(num_ranks) for _ in range(draw.randrange(1, 12))]
        homes = assign_homes(kv_ranks, num_ranks)
        share = -(-len(kv_ranks) // num_ranks)
        assert len(homes) == len(kv_ranks) and set(homes) <= set(range(num_ranks))
        assert all(homes.count(rank) <= share for rank in range(num_ranks))
        local = sum(home == kept for home, kept in zip(homes, kv_ranks, strict=True))
        assert local == sum(min(share, kv_ranks.count(rank)) for rank in range(num_ranks))
    assert assign_homes([1, 1, 1, 1], 2) == [1, 1, 0, 0]
    assert assign_homes([2], 3) == [2]


def test_local_tokens_stay_and_the_others_fill_the_ranks_that_have_few() -> None:
    assert assign_homes([0, 0, 0, 0], 2, [True, True, True, False]) == [0, 0, 0, 1]
    draw = random.Random(1)
    for _ in range(300):
        num_ranks, count = draw.randrange(1, 5), draw.randrange(1, 12)
        kv_ranks = [draw.randrange(num_ranks) for _ in range(count)]
        local = [draw.random() < 0.5 for _ in range(count)]
        homes = assign_homes(kv_ranks, num_ranks, local)
        stayed = zip(homes, kv_ranks, local, strict=True)
        assert all(home == rank for home, rank, stays in stayed if stays)
        share = -(-count // num_ranks)
        for rank in range(num_ranks):
            most = max(share, sum(here == rank for here, stays in zip(kv_ranks, local, strict=True) if stays))
            assert homes.count(rank) <= most


def test_a_local_request_that_outgrows_its_rank_is_spread_from_then_on() -> None:
    desk = Desk(num_blocks=3, sp_size=2, short_prompt_tokens=8)
    desk.add(0, 8, 13)
    spread = [token.spread for plan in desk.run() for token in plan.decode]
    assert spread == [False] * 4 + [True] * 8
    assert all(not (early and not late) for early, late in pairwise(spread))
    desk.check_empty()
