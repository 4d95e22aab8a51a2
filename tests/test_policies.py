"""What each scheduling policy promises, on a fake clock. Pure Python: no model, no ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from megatron_sps2.config import ScheduleConfig
from megatron_sps2.engine import scheduler
from megatron_sps2.engine.plan import StepPlan
from megatron_sps2.engine.policies import POLICIES, sps2
from megatron_sps2.engine.request import Request
from tests.desk import BLOCK, NUM_LAYERS, Desk, kind

TOKEN_LAYER_S = 0.001  # of one prompt token through one layer, on one rank
DECODE_S = 0.004


def seconds(plan: StepPlan) -> float:
    """As long as the busiest of 2 ranks computes: prompt tokens by the layer, decodes alike for any batch."""
    loads = [0.0, 0.0]
    for piece in plan.pieces:
        num_tokens = (piece.stop - piece.start) * (piece.last_layer - piece.first_layer)
        for rank in range(2) if piece.home is None else (piece.home,):
            loads[rank] += num_tokens / (2 if piece.home is None else 1)
    return max(loads) * TOKEN_LAYER_S + DECODE_S * bool(plan.decode)


def desk(policy: str, **more: Any) -> Desk:
    return Desk(**{"num_blocks": 1000, "cost": seconds, "policy": policy, "max_num_seqs": 8, **more})


def steps(of: Desk) -> Iterator[StepPlan]:
    for _ in range(5000):
        if not of.scheduler.has_work:
            return
        yield of.step()
    raise AssertionError("the scheduler is stuck")


def start_running(of: Desk, request_id: int = 99, max_tokens: int = 200) -> Request:
    """A request that decodes for a while."""
    request = of.add(request_id, 1, max_tokens)
    while not request.output:
        of.step()
    return request


# sps2


def test_sps2_decodes_and_pieces_of_a_prefill_take_turns() -> None:
    one = desk("sps2", layers_per_piece=1)
    start_running(one)
    one.add(0, 100, 1)
    kinds = [kind(one.step()) for _ in range(2 * NUM_LAYERS)]
    pieces = [f"p0:{layer}-{layer + 1}" for layer in range(NUM_LAYERS)]
    assert kinds == [each for piece in pieces for each in ("d99", piece)]


def gaps(of: Desk, num_prompts: int = 6) -> list[float]:
    """Seconds from one decode step's end to the next one's, while prompts of 40 tokens come."""
    start_running(of, max_tokens=300)
    ends = list[float]()
    for i in range(num_prompts):
        of.add(i, 40, 1)
    for plan in steps(of):
        if plan.decode:
            ends.append(of.now)
        if all(of.requests[i].finish_reason for i in range(num_prompts)):
            break
    return [later - earlier for earlier, later in zip(ends[1:-1], ends[2:], strict=True)]


@pytest.mark.parametrize(("target_ms", "layers"), [(30, 1), (50, 2), (70, 3), (90, 4), (1, 1)])
def test_sps2_sizes_its_pieces_by_the_time_that_may_pass_between_two_tokens(
    target_ms: int, layers: int
) -> None:
    """A layer of 40 tokens takes 20 ms on 2 ranks, a decode step 4: the rest is filled, with one at least."""
    one = desk("sps2", tbt_slo_ms=target_ms)
    found = gaps(one, 12)[NUM_LAYERS:]
    assert max(found) == pytest.approx(DECODE_S + layers * 20 * TOKEN_LAYER_S)


def test_sps2_without_a_target_gives_prefills_and_decodes_like_time() -> None:
    one = desk("sps2", cost=lambda plan: 0.005 if plan.decode else 0.002 * _num_layers(plan))
    start_running(one)
    for i in range(5):
        prompt, sizes = one.add(i, 40, 1), list[int]()
        while not prompt.output:
            sizes.append(_num_layers(one.step()))
    assert sizes == [0, 2, 0, 2], "two layers take about as long as a decode step"


@pytest.mark.parametrize(("num_prompts", "layers"), [(1, 1), (2, 2), (3, 3), (7, 4), (40, 4)])
def test_sps2_without_a_target_counts_who_waits_for_prefills_and_who_for_decodes(
    num_prompts: int, layers: int
) -> None:
    """A layer takes about as long as a decode step; prompts are long: one is prefilled at a time."""
    one = desk(
        "sps2",
        cost=lambda plan: 0.005 if plan.decode else 0.0048 * _num_layers(plan),
        num_blocks=20_000,
        short_prompt_tokens=16,
    )
    start_running(one, max_tokens=300)
    for i in range(500, 512):  # until its timing is learned
        one.add(i, 400, 1)
        while not one.requests[i].output:
            one.step()
    for i in range(num_prompts):
        one.add(i, 400, 1)
    first = [_num_layers(one.step()) for _ in range(4)]
    assert max(first) == layers


def _num_layers(plan: StepPlan) -> int:
    return plan.pieces[0].last_layer - plan.pieces[0].first_layer if plan.pieces else 0


def test_sps2_runs_a_short_prompt_between_two_layers_of_a_long_one() -> None:
    one = desk("sps2", layers_per_piece=1)
    one.add(0, 50, 1)
    one.run()  # From now on it knows how long a token takes.
    long = one.add(1, 1000, 1)
    one.step()
    short = one.add(2, 4, 1)
    kinds = [kind(plan) for plan in steps(one)]
    assert kinds[:NUM_LAYERS] == [f"p2:{layer}-{layer + 1}" for layer in range(NUM_LAYERS)]
    assert kinds[NUM_LAYERS] == "p1:1-2", "the long one goes on where it paused"
    assert (long.num_pauses, short.num_pauses) == (1, 0)
    assert one.scheduler.counters.num_pauses == 1


@pytest.mark.parametrize(("most", "overtakes"), [(1003, False), (1004, True), (10, False), (None, True)])
def test_sps2_begins_no_more_tokens_than_may_be_between_layers(most: int | None, overtakes: bool) -> None:
    """One prompt always may, however long it is."""
    one = desk("sps2", layers_per_piece=1, max_started_tokens=most)
    one.add(0, 50, 1)
    one.run()
    long = one.add(1, 1000, 1)
    one.step()
    short = one.add(2, 4, 1)
    assert kind(one.step()) == ("p2:0-1" if overtakes else "p1:1-2")
    one.run()
    assert long.finish_reason and short.finish_reason
    assert long.num_pauses == overtakes


def test_short_prompts_begin_however_much_is_between_layers() -> None:
    one = desk("sps2", layers_per_piece=1, short_prompt_tokens=16, max_started_tokens=10)
    one.add(0, 50, 1)
    one.run()
    one.add(1, 1000, 1)
    one.step()
    for i in (2, 3):
        one.add(i, 8, 1)
    assert [piece.request_id for piece in one.step().pieces] == [2, 3]


def wait_among_short_prompts(num_short: int) -> float:
    """When a long prompt has its first token, in times of its own prefill; a short one always waits too."""
    one = desk("sps2", layers_per_piece=1, max_num_seqs=4)
    one.add(0, 50, 1)
    one.run()
    began, count = one.now, 2
    long = one.add(1, 400, 1)
    while not long.output:
        if not any(request is not long for request in one.scheduler.waiting) and count < num_short:
            one.add(count, 20, 1)
            count += 1
        one.step()
    return (one.now - began) / (400 / 2 * NUM_LAYERS * TOKEN_LAYER_S)


def test_sps2_lets_no_stream_of_short_prompts_starve_a_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = wait_among_short_prompts(500)
    assert 2 < waited < sps2.PATIENCE + 2
    # Control: without aging it comes after all of them.
    monkeypatch.setattr(sps2, "PATIENCE", 1e9)
    assert wait_among_short_prompts(500) > 20


def residents_of_a_shared_prefix() -> list[int]:
    """Short requests by rank, of 40 that begin with the same 60 tokens and come one by one."""
    one = desk("sps2", short_prompt_tokens=100, max_num_seqs=40, prefix_caching=True)
    for i in range(40):
        request = one.add(i, [7] * 60 + [i % 5], 300)
        while not request.output:
            one.step()
    homes = [request.home for request in one.requests.values()]
    return [homes.count(rank) for rank in range(2)]


def test_sps2_spreads_short_requests_that_share_a_prefix(monkeypatch: pytest.MonkeyPatch) -> None:
    assert min(residents_of_a_shared_prefix()) >= 15
    # Control: by the prefix alone they all go where it was computed first.
    monkeypatch.setattr(scheduler, "RESIDENT_TOKENS", 0)
    assert residents_of_a_shared_prefix() == [40, 0]


def test_sps2_prefills_short_prompts_on_different_ranks_in_one_step() -> None:
    one = desk("sps2", short_prompt_tokens=32, layers_per_piece=NUM_LAYERS)
    for i, length in enumerate((30, 28, 5, 33)):
        one.add(i, length, 2)
    plan = one.step()
    homes = {piece.request_id: piece.home for piece in plan.pieces}
    assert homes.keys() == {0, 1, 2}, "all short ones, and not the long one"
    assert homes[0] != homes[1] and homes[2] == homes[1]
    assert {piece.strategy for piece in plan.pieces} == {"local"}
    for piece in plan.pieces:
        assert [bool(blocks) for blocks in piece.blocks] == [rank == piece.home for rank in range(2)]
    later = [kind(each) for each in steps(one)]
    assert later[0] == "d012" and "p3:0-4" in later


def test_sps2_bounds_a_batch_of_short_prompts_on_each_rank() -> None:
    one = desk("sps2", short_prompt_tokens=16, max_num_batched_tokens=40, layers_per_piece=NUM_LAYERS)
    for i in range(8):
        one.add(i, 16, 1)
    sizes = [len(plan.pieces) for plan in steps(one) if plan.pieces]
    assert sizes == [4, 4], "two a rank: a third would pass 40 tokens"


def test_sps2_tells_the_ranks_which_decodes_do_not_travel() -> None:
    one = desk("sps2", short_prompt_tokens=8, layers_per_piece=NUM_LAYERS)
    for i, length in enumerate((3, 40, 5, 41)):
        one.add(i, length, 20)
    while len(one.scheduler.running) < 4:
        one.step()
    batch = next(plan.decode for plan in steps(one) if len(plan.decode) == 4)
    assert {token.request_id for token in batch if not token.spread} == {0, 2}
    assert {token.home for token in batch if not token.spread} == {0, 1}
    assert all(token.home == token.kv_rank for token in batch if not token.spread)


def test_sps2_lets_no_short_prompt_pass_one_that_has_no_room_yet() -> None:
    one = desk("sps2", num_blocks=12, sp_size=1, watermark=0)
    old = start_running(one, max_tokens=30)
    while len(old.output) < 20:  # 5 blocks, later 8
        one.step()
    one.add(0, 35, 1)  # 9 blocks
    one.now += 1000  # It is overdue.
    one.add(1, 4, 1)
    started = [piece.request_id for plan in steps(one) for piece in plan.pieces if piece.prompt]
    assert started == [0, 1]


# sarathi


def test_sarathi_fills_its_budget_never_passes_it_and_stalls_no_decode() -> None:
    budget = 8 * BLOCK
    one = desk("sarathi", max_num_batched_tokens=budget)
    running = [start_running(one, 90 + i, 60) for i in range(3)]
    prompts = [one.add(i, length, 2) for i, length in enumerate((100, 7, 3, 50, 33))]
    loads = []
    for plan in steps(one):
        decoding = {token.request_id for token in plan.decode}
        alive = {request.request_id for request in running if request.finish_reason is None}
        assert decoding >= {number for number in alive if len(one.requests[number].output) < 60} - {None}
        sizes = [piece.stop - piece.start for piece in plan.pieces]
        loads.append(sum(sizes) + len(plan.decode))
        for piece, size in zip(plan.pieces, sizes, strict=True):
            is_last = piece.stop == one.requests[piece.request_id].num_prompt_tokens
            assert size % BLOCK == 0 or is_last, "a chunk is whole blocks"
            assert (piece.first_layer, piece.last_layer) == (0, NUM_LAYERS)
        if all(prompt.output for prompt in prompts):
            break
    assert max(loads) <= budget and min(loads[:5]) > budget - BLOCK - len(running)
    one.run()


def test_sarathi_serves_the_oldest_prompts_first_and_fills_up_with_younger_ones() -> None:
    one = desk("sarathi", max_num_batched_tokens=4 * BLOCK)
    for i, length in enumerate((6 * BLOCK, 2 * BLOCK + 1, 3)):
        one.add(i, length, 1)
    chunks = [[(piece.request_id, piece.start, piece.stop) for piece in plan.pieces] for plan in steps(one)]
    assert chunks[:3] == [[(0, 0, 16)], [(0, 16, 24), (1, 0, 8)], [(1, 8, 9), (2, 0, 3)]]


def test_sarathi_works_with_a_budget_below_a_block() -> None:
    one = desk("sarathi", max_num_batched_tokens=3, max_num_seqs=2)
    for i in range(3):
        one.add(i, 10, 3)
    for plan in steps(one):
        assert sum(piece.stop - piece.start for piece in plan.pieces) + len(plan.decode) <= 3
    assert all(request.finish_reason for request in one.requests.values())


def test_sarathi_needs_a_budget_for_every_running_request() -> None:
    with pytest.raises(ValueError, match="max_num_batched_tokens=8 is below max_num_seqs=9"):
        ScheduleConfig(policy="sarathi", max_num_seqs=9, max_num_batched_tokens=8)
    ScheduleConfig(policy="sps2", max_num_seqs=9, max_num_batched_tokens=8)


# fcfs


def test_fcfs_prefills_whole_prompts_before_any_decode_within_its_budget() -> None:
    one = desk("fcfs", max_num_batched_tokens=64)
    for i, length in enumerate((30, 34, 1, 200, 20)):
        one.add(i, length, 3)
    kinds = [kind(plan) for plan in steps(one)]
    assert kinds[:3] == ["p0,1:0-4", "p2:0-4", "p3:0-4"], "a prompt above the budget goes alone"
    assert kinds[3:] == ["p4:0-4", "d01234", "d01234", "-"]


def test_fcfs_stops_decoding_for_a_new_prompt() -> None:
    one = desk("fcfs")
    start_running(one, max_tokens=10)
    assert kind(one.step()) == "d99"
    one.add(0, 100, 5)
    assert [kind(one.step()) for _ in range(2)] == ["p0:0-4", "d099"]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_gives_every_request_its_tokens(policy: str) -> None:
    one = desk(policy, short_prompt_tokens=10, max_num_batched_tokens=32)
    for i in range(20):
        one.add(i, 1 + 7 * i % 60, 1 + i % 6)
        one.now += 0.01
        if i % 3 == 0:
            one.step()
    one.run()
    assert [len(one.requests[i].output) for i in range(20)] == [1 + i % 6 for i in range(20)]
    one.check_empty()
