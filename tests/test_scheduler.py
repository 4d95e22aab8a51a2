"""The scheduler's plans, without a model: turns, order, room, aborts. Pure Python on rank 0."""

from __future__ import annotations

import random
from typing import Any

import pytest

from megatron_sps2.config import (
    AttentionConfig,
    CacheConfig,
    KVCacheFull,
    ModelConfig,
    ParallelConfig,
    SamplingParams,
)
from megatron_sps2.engine.block_manager import BlockManager
from megatron_sps2.engine.plan import StepPlan
from megatron_sps2.engine.request import FinishReason, Request
from megatron_sps2.engine.sampler import SampledToken
from megatron_sps2.engine.scheduler import Scheduler, assign_homes

NUM_LAYERS = 4
BLOCK = 4


class Desk:
    """A scheduler and its blocks, with a model that says the same token again and again."""

    def __init__(
        self,
        num_blocks: int = 8,
        sp_size: int = 2,
        max_num_seqs: int = 2,
        strategy: Any = "auto",
        **more: Any,
    ) -> None:
        model = ModelConfig(
            num_layers=NUM_LAYERS,
            hidden_size=8,
            ffn_hidden_size=8,
            num_attention_heads=4,
            num_query_groups=4,
            head_dim=2,
            vocab_size=50,
            max_seq_len=1000,
        )
        parallel = ParallelConfig(sp_size=sp_size)
        self.blocks = BlockManager(CacheConfig(num_blocks=num_blocks, block_size=BLOCK), sp_size)
        self.scheduler = Scheduler(
            model,
            parallel,
            AttentionConfig(strategy=strategy),
            self.blocks,
            max_num_seqs=max_num_seqs,
            **more,
        )
        self.requests: dict[int, Request] = {}

    def add(self, request_id: int, num_prompt: int, max_tokens: int, num_past: int = 0) -> Request:
        request = Request(
            request_id=request_id,
            prompt_ids=(1,) * num_prompt,
            params=SamplingParams(max_tokens=max_tokens),
            num_past=num_past,
        )
        self.scheduler.add(request)
        self.requests[request_id] = request
        return request

    def step(self, keep_cache: bool = False) -> StepPlan:
        """A plan, run by nobody, and what the engine does after it."""
        plan = self.scheduler.schedule()
        done = [token.request_id for token in plan.decode]
        if plan.prefill and plan.prefill.last_layer == NUM_LAYERS:
            done = [plan.prefill.request_id]
        for request_id in done:
            request = self.requests[request_id]
            request.take(SampledToken(7), ())
            if plan.prefill:
                self.scheduler.prefilled(request)
            if request.finish_reason:
                self.scheduler.release(request, keep_cache)
        return plan

    def run(self, limit: int = 1000) -> list[StepPlan]:
        plans = []
        while self.scheduler.has_work:
            plans.append(self.step())
            assert len(plans) < limit, "the scheduler is stuck"
        return plans


def kind(plan: StepPlan) -> str:
    """'p3:0-1' a piece of request 3's prefill, 'd12' a decode of requests 1 and 2, '-' nothing."""
    if plan.prefill:
        return f"p{plan.prefill.request_id}:{plan.prefill.first_layer}-{plan.prefill.last_layer}"
    return "d" + "".join(str(i) for i in sorted(t.request_id for t in plan.decode)) if plan.decode else "-"


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
    first, second = plans[0].prefill, plans[1].prefill
    assert first and first.prompt and second and second.prompt is None


def test_first_come_first_served_and_never_more_than_max_num_seqs() -> None:
    desk = Desk(num_blocks=100, max_num_seqs=3)
    for i in range(8):
        desk.add(i, 2 + i % 3, 20 + (5 * i) % 7)
    order, largest = [], 0
    while desk.scheduler.has_work:
        plan = desk.step()
        largest = max(largest, len(plan.decode))
        if plan.prefill:
            order.append(plan.prefill.request_id)
    assert (order, largest) == (list(range(8)), 3)
    assert all(request.finish_reason is FinishReason.LENGTH for request in desk.requests.values())
    assert desk.blocks.num_free_blocks == [100, 100]


def test_a_request_waits_until_there_is_room_for_its_whole_answer() -> None:
    desk = Desk(num_blocks=4)  # 2 ranks x 4 blocks x 4 tokens = 32 tokens
    desk.add(0, 4, 17)  # 20 tokens in the cache: 10 a rank, 3 blocks
    desk.add(1, 8, 3)  # 10 tokens: 5 a rank, 2 blocks, where 1 is left
    kinds = [kind(plan) for plan in desk.run()]
    assert kinds.index("p1:0-4") == kinds.index("p0:0-4") + 17, "it was admitted before the first ended"
    roomy = Desk(num_blocks=5)
    roomy.add(0, 4, 17)
    roomy.add(1, 8, 3)
    kinds = [kind(plan) for plan in roomy.run()]
    assert kinds.index("p1:0-4") < kinds.index("p0:0-4") + 3, "there was room for both"


@pytest.mark.parametrize("seed", range(6))
def test_no_mixture_of_requests_gets_stuck_or_overflows(seed: int) -> None:
    """Turns onto kept caches, aborts and tight caches: KVCacheFull would be raised by a wrong reservation."""
    draw = random.Random(seed)
    sp_size = draw.randrange(1, 5)
    desk = Desk(
        num_blocks=draw.randrange(3, 7), sp_size=sp_size, max_num_seqs=4, layers_per_piece=draw.choice([1, 4])
    )
    longest = desk.blocks.capacity // 2
    num_turns = 0
    for request_id in range(60):
        total = draw.randrange(2, longest)
        desk.add(request_id, draw.randrange(1, total), draw.randrange(1, longest - total + 2))
        for _ in range(draw.randrange(12)):
            desk.step()
        if draw.random() < 0.2:
            desk.scheduler.abort(draw.choice(list(desk.requests)))
        if request_id % 7 == 0:  # A conversation of short turns, all else done.
            desk.run()
            desk.add(1000 + request_id, 1, 1)
            while desk.requests[1000 + request_id].finish_reason is None:
                desk.step(keep_cache=True)
            for _ in range(5):
                past = sum(desk.blocks.tokens_per_rank(1000 + request_id))
                turn = desk.add(1000 + request_id, 1 + (seed > 2), 1, num_past=past)
                while turn.finish_reason is None:
                    desk.step(keep_cache=True)
                num_turns += 1
            desk.scheduler.release(turn)
    desk.run()
    assert num_turns and desk.blocks.num_free_blocks == [desk.blocks.config.num_blocks] * sp_size


def test_caches_kept_of_finished_requests_count_as_taken() -> None:
    desk = Desk(num_blocks=4)
    old = desk.add(0, 20, 1)  # 3 of 4 blocks on each rank
    desk.step(keep_cache=True)
    assert old.finish_reason is FinishReason.LENGTH and desk.blocks.num_free_blocks == [1, 1]
    desk.add(1, 2, 1)
    assert kind(desk.step()) == "p1:0-4", "one block was free"
    desk.add(2, 10, 1)
    with pytest.raises(
        KVCacheFull, match=r"request 2 needs 2 KV blocks .* keep the cache; release one of \[0\]"
    ):
        desk.step()
    desk.scheduler.release(old)
    plan = desk.step()
    assert (kind(plan), set(plan.freed)) == ("p2:0-4", {0, 1})


def test_a_turn_onto_a_kept_cache_needs_only_what_is_new() -> None:
    desk = Desk(num_blocks=4)
    desk.add(0, 20, 1)
    desk.step(keep_cache=True)
    desk.add(0, 9, 4, num_past=20)  # 32 tokens, all that fits
    plan = desk.step()
    assert plan.prefill and plan.prefill.prompt
    assert (plan.prefill.prompt.strategy, plan.prefill.prompt.num_past) == ("pass_q", 20)
    assert [len(blocks) for blocks in plan.prefill.prompt.blocks] == [1, 1]
    desk.run()
    assert desk.blocks.num_free_blocks == [4, 4]


@pytest.mark.parametrize("state", ["waiting", "prefilling", "running"])
def test_an_abort_frees_the_blocks_in_every_state(state: str) -> None:
    desk = Desk(layers_per_piece=1)
    request = desk.add(0, 5, 10)
    for _ in range({"waiting": 0, "prefilling": 2, "running": 6}[state]):
        desk.step()
    assert (desk.blocks.num_free_blocks == [8, 8]) == (state == "waiting")
    other = desk.add(1, 5, 2)
    desk.scheduler.abort(0)
    assert request.finish_reason is FinishReason.ABORT
    assert desk.blocks.num_free_blocks == [8, 8]
    plans = desk.run()
    assert plans[0].freed == (0,) and "0" not in {kind(plan)[1:2] for plan in plans}
    assert other.finish_reason is FinishReason.LENGTH
    desk.scheduler.abort(0)
    desk.scheduler.abort(99)
    assert not desk.scheduler.has_work


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
    desk = Desk(strategy="pass_kv")
    desk.add(0, 8, 1)
    desk.step(keep_cache=True)
    with pytest.raises(ValueError, match="strategy='pass_kv' cannot prefill onto a cached context"):
        desk.add(0, 4, 1, num_past=8)


def test_the_plan_holds_layout_blocks_and_positions() -> None:
    desk = Desk(strategy="ulysses")
    desk.add(0, 5, 3)
    plan = desk.step()
    assert plan.prefill and plan.prefill.prompt and desk.scheduler.last_strategy == "ulysses"
    assert plan.prefill.prompt.blocks == ((0,), (0,))
    assert desk.blocks.tokens_per_rank(0) == [3, 2]
    (token,) = desk.step().decode
    assert (token.token_id, token.position, token.kv_rank, token.home) == (7, 5, 1, 1)
    assert token.new_block is None


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
