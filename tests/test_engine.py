"""The engine on a tiny random model: batches, stops, seeds, logprobs, second turns, poison and refusals.

All cases of a rank grid run on one engine in one launch; transformers is the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from checkpoints_tools.convert import convert
from megatron_sps2.config import CacheConfig, KVCacheFull, ParallelConfig, SamplingParams, ScheduleConfig
from megatron_sps2.engine.build import EngineConfig, build_engine
from megatron_sps2.engine.engine import Engine, _take_prompt_logprobs
from megatron_sps2.engine.plan import StepPlan
from megatron_sps2.engine.request import FinishReason, Request
from megatron_sps2.engine.runner import StepResult
from megatron_sps2.engine.sampler import SampledToken
from tests.broken_wire import exchange_skipped
from tests.ranks import run_ranks
from tests.tiny_llama import VOCAB_SIZE, prompt, save_hf_llama

HEADS = (8, 2)
PROMPTS = [prompt(length, seed=length).tolist() for length in (5, 1, 33, 18, 2, 40)]
NUM_GENERATED = 10
GREEDY = SamplingParams(max_tokens=NUM_GENERATED, ignore_eos=True)
# (sp, tp)
GRIDS = {"sp1": (1, 1), "sp2": (2, 1), "tp2": (1, 2)}


def hf_greedy(
    hf: LlamaForCausalLM, ids: Sequence[int], num_tokens: int, forbidden: Sequence[int] = (), until: int = 0
) -> list[int]:
    """Greedy tokens, none of `forbidden` among the first `until`; the whole context anew for each."""
    ids, found = list(ids), list[int]()
    while len(found) < num_tokens:
        logits = hf(torch.tensor([ids + found])).logits[0, -1].clone()
        if len(found) < until:
            logits[list(forbidden)] = -torch.inf
        found.append(int(logits.argmax()))
    return found


@dataclass(frozen=True, eq=False)
class Reference:
    """A model whose end-of-sequence token is one that it really says, and its greedy answers to PROMPTS."""

    hf: LlamaForCausalLM
    checkpoint: str
    tokens: list[list[int]]
    eos: int
    poison: int  # a token that the answer to PROMPTS[0] holds early, and no other prompt or answer


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("engine")
    with torch.inference_mode():
        hf = save_hf_llama(folder / "first", *HEADS)
        tokens = [hf_greedy(hf, ids, NUM_GENERATED) for ids in PROMPTS]
        eos = tokens[2][4]
        hf = save_hf_llama(folder / "hf", *HEADS, eos_token_id=eos)  # The same weights again.
    convert(folder / "hf", folder / "megatron")
    others = {token for group in (*PROMPTS, *tokens[1:]) for token in group}
    poison = next(token for token in tokens[0][1:-2] if token not in others)
    return Reference(hf, str(folder / "megatron"), tokens, eos, poison)


def finish_all(engine: Engine, requests: Sequence[Request]) -> list[tuple[list[int], FinishReason | None]]:
    """Steps until all are finished, giving back the blocks of each at its end."""
    released = set[int]()
    for _ in range(2000):
        for request in requests:
            if request.finish_reason and request.request_id not in released:
                released.add(request.request_id)
                engine.release(request)
        if not engine.has_work:
            return [(request.output_ids, request.finish_reason) for request in requests]
        engine.step()
    raise AssertionError("the engine is stuck")


def ask(engine: Engine, prompts: Sequence[Sequence[int]], *params: SamplingParams) -> list[Any]:
    """All prompts at once, each with its own parameters or all with the same."""
    each = params if len(params) == len(prompts) else params * len(prompts)
    return finish_all(engine, [engine.add_request(ids, p) for ids, p in zip(prompts, each, strict=True)])


def seeded(seed: int) -> SamplingParams:
    return replace(GREEDY, temperature=1.0, top_p=0.9, seed=seed)


def two_turns(engine: Engine) -> list[list[int]]:
    """Answers of a conversation whose second and third turn go onto the kept cache."""
    request = engine.add_request(PROMPTS[3], GREEDY)
    answers = []
    for turn in (PROMPTS[4], PROMPTS[1], None):
        while request.finish_reason is None:
            engine.step()
        answers.append(request.output_ids)
        if turn:
            request = engine.continue_request(request, [request.output_ids[-1], *turn], GREEDY)
    finish_all(engine, [request])
    return answers


def stop_midway(engine: Engine) -> list[int]:
    """A request ended between two layers of its prefill, one while it waited, one while it ran."""
    first, second, third, fourth = (engine.add_request(ids, GREEDY) for ids in PROMPTS[:4])
    engine.step()
    engine.abort(first)
    engine.abort(third)
    while not second.output:
        engine.step()
    engine.finish(second)
    finish_all(engine, [second, fourth])
    assert (first.finish_reason, second.finish_reason) == (FinishReason.ABORT, FinishReason.STOP)
    return fourth.output_ids


def abort_finished(engine: Engine) -> list[int]:
    """An abort that comes too late: the blocks of the finished request go back all the same."""
    request = engine.add_request(PROMPTS[2], GREEDY)
    while request.finish_reason is None:
        engine.step()
    engine.abort(request)
    finish_all(engine, [])
    assert request.finish_reason is FinishReason.LENGTH
    return engine.audit()


def scenario(engine: Engine, eos: int) -> dict[str, Any]:
    """On rank 0: everything that is asked of the engine."""
    found: dict[str, Any] = {}
    found["alone"] = [ask(engine, [ids], GREEDY)[0][0] for ids in PROMPTS]
    found["together"] = [tokens for tokens, _ in ask(engine, PROMPTS, GREEDY)]
    found["seeded alone"] = [ask(engine, [ids], seeded(i))[0][0] for i, ids in enumerate(PROMPTS)]
    found["seeded"] = [tokens for tokens, _ in ask(engine, PROMPTS, *map(seeded, range(len(PROMPTS))))]
    found["one seed"] = [tokens for tokens, _ in ask(engine, [PROMPTS[0]] * 3, *map(seeded, (1, 1, 2)))]
    bare = SamplingParams(max_tokens=NUM_GENERATED)
    found["ends"] = ask(
        engine,
        [PROMPTS[2]] * 4,
        bare,
        replace(bare, min_tokens=7),
        replace(bare, ignore_eos=True, stop_token_ids=(eos,)),
        replace(bare, ignore_eos=True, stop_token_ids=(eos,), min_tokens=7),
    )
    request = engine.add_request(PROMPTS[5], replace(GREEDY, logprobs=5))
    finish_all(engine, [request])
    found["logprobs"] = request.output
    found["turns"] = two_turns(engine)
    found["stopped midway"] = stop_midway(engine)
    found["aborted at its end"] = abort_finished(engine)
    found["refusals"] = refusals(engine)
    found["free"] = engine.blocks.num_free_blocks
    return found


def refusals(engine: Engine) -> list[str]:
    """What is said to prompts that cannot be served; the engine goes on after each."""
    bad: list[Callable[[], object]] = [
        lambda: engine.add_request([], GREEDY),
        lambda: engine.add_request([1, VOCAB_SIZE], GREEDY),
        lambda: engine.add_request([1] * 119, GREEDY),
    ]
    said = [refusal(make) for make in bad]
    assert not engine.has_work, "a refused request was queued"
    return said


def refusal(make: Callable[[], object]) -> str:
    try:
        make()
    except ValueError as error:
        return str(error)
    return "not refused"


def watch_blocks(engine: Engine) -> None:
    """From now on every step checks that this rank holds just the blocks that its tokens need, none twice."""
    runner, cache = engine._runner, engine._runner._cache
    run = runner.run

    def watched(plan: StepPlan) -> StepResult:
        result = run(plan)
        tables = list(cache._tables.values())
        held = [block for table in tables for block in table.blocks]
        assert len(held) == len(set(held)), f"a block is held twice: {held}"
        for table in tables:
            assert len(table.blocks) == -(-table.num_tokens // cache.config.block_size), table
        return result

    runner.run = watched  # type: ignore[method-assign]


def run_scenario(config: EngineConfig, eos: int) -> tuple[dict[str, Any], int, int]:
    """On a rank: rank 0's findings, blocks still used and sequences still known here."""
    engine = build_engine(config)
    watch_blocks(engine)
    found: dict[str, Any] = {}
    if engine.is_leader:
        found = scenario(engine, eos)
        engine.stop()
    else:
        engine.follow()
    runner = engine._runner
    return found, runner._cache.num_used_blocks, len(runner._sequences) + len(runner._paused)


def make_config(reference: Reference, grid: str, **more: Any) -> EngineConfig:
    sp_size, tp_size = GRIDS[grid]
    schedule = ScheduleConfig(max_num_seqs=more.pop("max_num_seqs", 2), layers_per_piece=1)
    values = {"max_model_len": 128, "block_size": 8, "schedule": schedule, **more}
    return EngineConfig(
        checkpoint=reference.checkpoint, parallel=ParallelConfig(sp_size=sp_size, tp_size=tp_size), **values
    )


@functools.cache
def findings(reference: Reference, grid: str) -> dict[str, Any]:
    config = make_config(reference, grid)
    results = run_ranks(config.parallel.world_size, run_scenario, config, reference.eos)
    for rank, (_, used, known) in enumerate(results):
        assert (used, known) == (0, 0), f"rank {rank} still holds {used} blocks and {known} requests"
    found: dict[str, Any] = results[0][0]
    assert set(found["free"]) == {config.sized_cache().num_blocks}
    return found


each_grid = pytest.mark.parametrize("grid", GRIDS)


@each_grid
def test_more_requests_than_max_num_seqs_all_finish_as_if_alone(reference: Reference, grid: str) -> None:
    found = findings(reference, grid)
    assert found["alone"] == reference.tokens
    assert found["together"] == reference.tokens


@each_grid
def test_a_seed_gives_the_same_tokens_alone_in_a_batch_and_on_every_grid(
    reference: Reference, grid: str
) -> None:
    found = findings(reference, grid)
    assert found["seeded"] == found["seeded alone"] == findings(reference, "sp1")["seeded"]
    assert found["seeded"] != reference.tokens, "nothing was drawn"
    first, again, other = found["one seed"]
    assert first == again != other


@each_grid
def test_eos_and_stop_tokens_end_an_answer_but_not_before_min_tokens(reference: Reference, grid: str) -> None:
    whole, eos = reference.tokens[2], reference.eos
    with torch.inference_mode():
        late = hf_greedy(reference.hf, PROMPTS[2], NUM_GENERATED, [eos], until=7)
    late_end = FinishReason.STOP if eos in late else FinishReason.LENGTH
    late = late[: late.index(eos) + 1] if eos in late else late
    early = whole[: whole.index(eos) + 1]
    want = [(early, FinishReason.STOP), (late, late_end)] * 2
    assert findings(reference, grid)["ends"] == want


@each_grid
def test_logprobs_are_the_log_softmax_of_the_logits(reference: Reference, grid: str) -> None:
    output = findings(reference, grid)["logprobs"]
    ids = [*PROMPTS[5], *(token.token_id for token in output)]
    with torch.inference_mode():
        logits: Tensor = reference.hf(torch.tensor([ids])).logits[0, len(PROMPTS[5]) - 1 : -1]
    want = logits.double().log_softmax(-1)
    assert len(output) == NUM_GENERATED
    for token, row in zip(output, want, strict=True):
        # fp32 logits of two implementations
        assert token.logprob == pytest.approx(row[token.token_id].item(), abs=1e-4)
        top = dict(token.top_logprobs)
        assert list(top) == row.topk(5).indices.tolist()
        assert list(top.values()) == pytest.approx(row.topk(5).values.tolist(), abs=1e-4)


@each_grid
def test_later_turns_onto_the_kept_cache_equal_a_fresh_prefill(reference: Reference, grid: str) -> None:
    ids, want = list(PROMPTS[3]), []
    with torch.inference_mode():
        for turn in (PROMPTS[4], PROMPTS[1], []):
            want.append(hf_greedy(reference.hf, ids, NUM_GENERATED))
            ids += [*want[-1], *turn]
    assert findings(reference, grid)["turns"] == want


@each_grid
def test_requests_ended_midway_leave_the_others_alone(reference: Reference, grid: str) -> None:
    assert findings(reference, grid)["stopped midway"] == reference.tokens[3]


@each_grid
def test_an_abort_after_the_end_gives_back_the_blocks(reference: Reference, grid: str) -> None:
    assert set(findings(reference, grid)["aborted at its end"]) == {0}


def test_prompts_that_cannot_be_served_are_refused_and_say_why(reference: Reference) -> None:
    assert findings(reference, "sp1")["refusals"] == [
        "the prompt is empty (0 tokens); give at least one token",
        "token id 251 at position 1 is unknown; use integers from 0 to 250",
        "prompt of 119 tokens + max_tokens=10 = 129 exceeds 128 (--max-model-len); shorten the prompt or "
        "lower --max-tokens",
    ]


def poison_embedding(engine: Engine, token_id: int) -> None:
    """From now on a forward of this token gives NaN, in its own request only."""
    forward = engine._runner._forward
    clean = forward.embed

    def embed(token_ids: Tensor, positions: Tensor) -> Tensor:
        return clean(token_ids, positions).masked_fill((token_ids == token_id).unsqueeze(-1), torch.nan)

    forward.embed = embed  # type: ignore[method-assign]


def run_poisoned(config: EngineConfig, token_id: int) -> dict[str, Any]:
    """On rank 0: one request fails in its prompt, one in its answer; others run beside and after them."""
    engine = build_engine(config)
    poison_embedding(engine, token_id)
    if not engine.is_leader:
        engine.follow()
        return {}
    found: dict[str, Any] = {"bad prompt": ask(engine, [[1, token_id, 3], PROMPTS[1]], GREEDY)}
    found["bad answer"] = ask(engine, [PROMPTS[0], *PROMPTS[2:4]], GREEDY)
    found["after"] = ask(engine, PROMPTS[1:], GREEDY)
    found["too long"] = refusal(lambda: engine.add_request([1] * 503, GREEDY))
    found["too large"] = refusal(lambda: engine.add_request([1] * 490, GREEDY))
    found["wrongly"] = continue_wrongly(engine)
    found["full"] = keep_until_full(engine)
    engine.stop()
    return found


def continue_wrongly(engine: Engine) -> list[str]:
    """Answers that cannot be continued: ended by hand, with another first token, already released."""
    first, second = (engine.add_request(PROMPTS[2], GREEDY) for _ in range(2))
    engine.step()
    engine.finish(first, FinishReason.ABORT)
    said = [refusal(lambda: engine.continue_request(first, [1, 2], GREEDY))]
    finish_all(engine, [first])
    while second.finish_reason is None:
        engine.step()
    wrong = (second.output_ids[-1] + 1) % VOCAB_SIZE
    said.append(refusal(lambda: engine.continue_request(second, [wrong, 2], GREEDY)))
    engine.release(second)
    said.append(refusal(lambda: engine.continue_request(second, [second.output_ids[-1], 2], GREEDY)))
    return said


def keep_until_full(engine: Engine) -> tuple[str, list[int]]:
    """Finished requests that are not released fill the cache; releasing one makes room again."""
    kept: list[Request] = []
    for _ in range(20):
        request = engine.add_request(PROMPTS[2], replace(GREEDY, max_tokens=1))
        try:
            while request.finish_reason is None:
                engine.step()
        except KVCacheFull as error:
            engine.release(kept.pop())
            finish_all(engine, [request, *kept])
            return str(error), request.output_ids
        kept.append(request)
    return "never full", []


@pytest.mark.parametrize("grid", ["sp1", "sp2"])
def test_poisoned_logits_end_their_own_request_only_and_a_small_cache_refuses(
    reference: Reference, grid: str
) -> None:
    """The cache is small, so that later requests get the blocks that held NaN."""
    config = make_config(
        reference, grid, max_model_len=1000, max_num_seqs=3, cache=CacheConfig(num_blocks=20, block_size=8)
    )
    found = run_ranks(config.parallel.world_size, run_poisoned, config, reference.poison)[0]
    fine = [(tokens, FinishReason.LENGTH) for tokens in reference.tokens]
    assert found["bad prompt"] == [([], FinishReason.ERROR), fine[1]]
    before = reference.tokens[0][: reference.tokens[0].index(reference.poison) + 1]
    assert found["bad answer"] == [(before, FinishReason.ERROR), *fine[2:4]]
    assert found["after"] == fine[1:]
    assert found["too long"].startswith("prompt of 503 tokens + max_tokens=10 = 513 exceeds 512 (max_seq_len")
    num_blocks = {"sp1": 63, "sp2": 32}[grid]  # of 8 tokens for 490 + 9 on each rank
    assert found["too large"].startswith(
        f"the request may grow to {num_blocks} KV blocks of 8 tokens on an sp"
    )
    rules = "only a finished answer can be continued", "must begin with the newest token", "it was released"
    assert all(rule in said for rule, said in zip(rules, found["wrongly"], strict=True))
    assert "release one of" in found["full"][0] and found["full"][1] == reference.tokens[2][:1]


def test_prompt_logprobs_of_chunks_that_are_cut_anew_after_a_preemption_have_no_gap() -> None:
    request = Request(request_id=0, prompt_ids=tuple(range(10, 22)), params=GREEDY, num_past=7)
    scored = [SampledToken(token_id) for token_id in request.prompt_ids[1:]]
    for start, stop in ((0, 5), (5, 8), (0, 6), (6, 9), (9, 11), (11, 12)):  # of the prompt's tokens
        _take_prompt_logprobs(request, request.num_past + start, scored[start:stop])
    assert request.prompt_logprobs == [None, *scored]
    request.output.append(SampledToken(99))  # Computed again, the answer is not the prompt's.
    _take_prompt_logprobs(request, request.num_past, [*scored, SampledToken(99)])
    assert request.prompt_logprobs == [None, *scored]


def run_skipped(config: EngineConfig) -> list[int]:
    with exchange_skipped():
        engine = build_engine(config)
        if engine.is_leader:
            tokens: list[int] = ask(engine, [PROMPTS[2]], GREEDY)[0][0]
            engine.stop()
            return tokens
        engine.follow()
    return []


def test_control_without_exchange_the_tokens_are_wrong(reference: Reference) -> None:
    tokens = run_ranks(2, run_skipped, make_config(reference, "sp2"))[0]
    assert tokens != reference.tokens[2]
