"""Whatever the policy, the cache and the grid: tokens, log-probabilities and bytes are what they must be.

A tiny random model whose KV cache is too small for what is asked of it; transformers is the reference. All
jobs of a grid run in one launch of ranks, each on an engine of its own.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from checkpoints_tools.convert import convert
from megatron_sps2.attention.core import SequenceParallelAttention, StepContext
from megatron_sps2.config import AttentionConfig, CacheConfig, ParallelConfig, SamplingParams, ScheduleConfig
from megatron_sps2.csa_setting import CsaSetting
from megatron_sps2.engine.build import EngineConfig, assemble
from megatron_sps2.engine.engine import Engine
from megatron_sps2.engine.plan import StepPlan
from megatron_sps2.engine.request import FinishReason, Request
from megatron_sps2.engine.sampler import SampledToken
from megatron_sps2.model.checkpoint import load_gpt
from megatron_sps2.model.gpt import GptForward
from megatron_sps2.model.manifest import load_model_config
from megatron_sps2.parallel.groups import ParallelGroups
from megatron_sps2.parallel.traffic import DECODE_COLLECTIVES, PREFILL_COLLECTIVES, Traffic
from tests.broken_wire import exchange_skipped
from tests.ranks import run_ranks
from tests.test_engine import hf_greedy
from tests.tiny_llama import prompt, save_hf_llama

HEADS = (8, 2)
BLOCK = 4
NUM_GENERATED = 16
SHORT = 40
# fp32 logits of two implementations, and sums in another order where a prompt came in chunks.
LOGPROB_TOLERANCE = 1e-4
GREEDY = SamplingParams(max_tokens=NUM_GENERATED, ignore_eos=True)
SEEDED = replace(GREEDY, temperature=1.0, top_p=0.9, seed=3)
SCORED = replace(GREEDY, prompt_logprobs=2)
# What a prompt shares with all others (tokens of one text), and its length.
PROMPTS = [
    (prompt(300, seed=7)[:shared].tolist() + prompt(300, seed=length)[: length - shared].tolist())
    for shared, length in (
        *((0, 1), (24, 25), (0, 300), (30, 38), (60, 65), (0, 2), (150, 200)),
        *((8, 33), (100, 130), (20, 90), (24, 40), (40, 60), (16, 36), (9, 70)),
    )
]
# Tokens that the longest of the shorter prompts needs with its answer, and a few.
ROOM_LEFT = 112
PARAMS = [GREEDY] * 7 + [SCORED, SCORED, GREEDY, SEEDED, replace(GREEDY, ignore_eos=False), SEEDED, SCORED]
# (sp, tp)
GRIDS = {"sp1": (1, 1), "sp2": (2, 1), "sp3": (3, 1), "tp2": (1, 2)}
CSA = CsaSetting(
    segment_size=16,
    num_sinks=2,
    window=5,
    tail=7,
    num_probes=5,
    group_sizes=(1, 2),
    degrees=(1, 2),
    floor=1.0,
)


@dataclass(frozen=True)
class Job:
    """One engine and what is asked of it."""

    schedule: ScheduleConfig
    is_small: bool = True  # a cache that does not hold all of its running requests
    asks: str = "everything"
    csa: CsaSetting | None = None

    def config(self, checkpoint: str, parallel: ParallelConfig) -> EngineConfig:
        # Little more than the longest prompt and its answer.
        num_tokens = 316 if self.asks == "everything" else 88
        # A block more where chunks may come to lie unevenly.
        small = -(-num_tokens // (BLOCK * parallel.sp_size)) + (parallel.sp_size > 1)
        num_blocks = small if self.is_small else 1000
        return EngineConfig(
            checkpoint=checkpoint,
            parallel=parallel,
            attention=AttentionConfig(mode="csa" if self.csa else "exact"),
            csa=self.csa,
            max_model_len=500,
            schedule=self.schedule,
            cache=CacheConfig(num_blocks=num_blocks, block_size=BLOCK),
        )


@dataclass
class Served:
    """Of one job, on one rank; all but `left` and `bytes_sent` from rank 0."""

    tokens: list[list[int]] = field(default_factory=list)
    prompt_logprobs: list[list[SampledToken | None]] = field(default_factory=list)
    preemptions: list[int] = field(default_factory=list)
    num_cached: list[int] = field(default_factory=list)
    homes: list[int | None] = field(default_factory=list)
    reasons: list[FinishReason | None] = field(default_factory=list)
    num_swapped: int = 0
    num_pauses: int = 0
    largest_chunk: int = 0
    spread_rows: int = 0
    moved_rows: int = 0
    local_rows: int = 0
    leaked: list[int] = field(default_factory=list)
    left: int = 0  # requests that this rank still knows of
    bytes_sent: dict[str, int] = field(default_factory=dict)


def schedule(policy: str, **more: Any) -> ScheduleConfig:
    values = {"max_num_seqs": 14, "watermark": 0.0, "max_num_batched_tokens": 48, "layers_per_piece": 1}
    return ScheduleConfig(policy=policy, **{**values, "short_prompt_tokens": SHORT, **more})  # type: ignore[arg-type]


def jobs_for(grid: str) -> dict[str, Job]:
    found = {}
    kinds = {"sp1": (0, 1), "sp2": (0, 1, 2), "sp3": (0, 1), "tp2": (2,)}[grid]
    for policy in ("sps2", "sarathi", "fcfs"):
        for kind in kinds:
            prefix_caching, preemption = ((False, "recompute"), (True, "swap"), (True, "recompute"))[kind]
            more = {"prefix_caching": prefix_caching, "preemption": preemption}
            if kind:
                more["layers_per_piece"] = 2  # all of them
            found[f"{policy} {preemption}{' prefix' * prefix_caching}"] = Job(schedule(policy, **more))
    found["csa"] = Job(schedule("sps2", prefix_caching=True, layers_per_piece=2), csa=CSA)
    found["turns"] = Job(schedule("sps2", short_prompt_tokens=0, preemption="recompute"), asks="turns")
    found["roomy"] = Job(schedule("sps2"), is_small=False)
    found["poison"] = Job(schedule("sps2", prefix_caching=True), is_small=False, asks="poison")
    if grid == "sp2":
        found["short"] = Job(schedule("sps2", short_prompt_tokens=400), is_small=False)
        found["skipped"] = Job(schedule("sps2"), is_small=False)
    return found


def serve(checkpoint: str, grid: str, poison: int) -> dict[str, Served]:
    """On a rank: every job of the grid."""
    sp_size, tp_size = GRIDS[grid]
    parallel = ParallelConfig(sp_size=sp_size, tp_size=tp_size)
    groups, found = ParallelGroups.create(parallel), {}
    for name, job in jobs_for(grid).items():
        context = StepContext()
        core = functools.partial(SequenceParallelAttention, context=context)
        forward = load_gpt(checkpoint, groups.to_megatron(), core, torch.float32)
        if job.asks == "poison":
            poison_embedding(forward, poison)
        if name == "skipped":
            skip_exchanges(forward)
        engine = assemble(job.config(checkpoint, parallel), groups, forward, context)
        found[name] = run_job(engine, job, poison)
    return found


def poison_embedding(forward: GptForward, token_id: int) -> None:
    clean = forward.embed
    forward.embed = lambda ids, places: clean(ids, places).masked_fill(  # type: ignore[method-assign]
        (ids == token_id).unsqueeze(-1), torch.nan
    )


def skip_exchanges(forward: GptForward) -> None:
    """Nothing travels inside of layers; sampled tokens still do."""
    whole = forward.layer

    def layer(index: int, hidden: Tensor, angles: Tensor) -> Tensor:
        with exchange_skipped():
            return whole(index, hidden, angles)

    forward.layer = layer  # type: ignore[method-assign]


def run_job(engine: Engine, job: Job, poison: int) -> Served:
    served = Served()
    engine.observe = lambda plan, *_: count(plan, served)
    # No times are learned, so that every run of a job makes the same plans.
    engine.scheduler._policy.observe = lambda *_: None  # type: ignore[method-assign]
    if engine.is_leader:
        ask = {"everything": ask_everything, "turns": take_turns, "poison": ask_poisoned}[job.asks]
        requests = ask(engine, poison)
        served.tokens = [request.output_ids for request in requests]
        served.prompt_logprobs = [request.prompt_logprobs for request in requests]
        served.preemptions = [request.num_preemptions for request in requests]
        served.num_cached = [request.num_cached for request in requests]
        served.homes = [request.home for request in requests]
        served.reasons = [request.finish_reason for request in requests]
        served.num_pauses = engine.scheduler.counters.num_pauses
        served.leaked = engine.audit()
        engine.stop()
    else:
        engine.follow()
    runner, cache = engine._runner, engine._runner._cache
    served.left = sum(map(len, (runner._sequences, runner._paused, cache._tables, cache._swapped)))
    served.bytes_sent = {
        "prefill": engine.ledger.total("prefill", *PREFILL_COLLECTIVES),
        "decode": engine.ledger.total("decode", *DECODE_COLLECTIVES),
        "moved": engine.ledger.total("decode", "move_new_kv"),
    }
    return served


def count(plan: StepPlan, served: Served) -> None:
    served.num_swapped += len(plan.swapped_out)
    served.largest_chunk = max([served.largest_chunk, *(piece.stop - piece.start for piece in plan.pieces)])
    served.spread_rows += sum(token.spread for token in plan.decode)
    served.moved_rows += sum(token.spread and token.home != token.kv_rank for token in plan.decode)
    served.local_rows += sum(not token.spread for token in plan.decode)


def finish_all(engine: Engine, requests: Sequence[Request], release: bool = True) -> None:
    released = set[int]()
    for _ in range(3000):
        for request in requests:
            if release and request.finish_reason and request.request_id not in released:
                released.add(request.request_id)
                engine.release(request)
        if not engine.has_work:
            return
        engine.step()
    raise AssertionError("the engine is stuck")


def ask_everything(engine: Engine, _: int) -> list[Request]:
    """First the long prompts; the others, shortest first, while an old answer keeps most of a small cache."""
    by_length = sorted(range(len(PROMPTS)), key=lambda i: len(PROMPTS[i]))
    requests = ask_some(engine, by_length[-3:])
    ballast = prompt(min(engine.blocks.capacity, 400) - ROOM_LEFT, seed=999)
    kept = engine.add_request(ballast.tolist(), replace(GREEDY, max_tokens=1), "exact")
    finish_all(engine, [kept], release=False)
    requests |= ask_some(engine, by_length[:-3])
    finish_all(engine, [kept])
    return [requests[i] for i in range(len(PROMPTS))]


def ask_some(engine: Engine, which: Sequence[int]) -> dict[int, Request]:
    requests = {i: engine.add_request(PROMPTS[i], with_min(PARAMS[i])) for i in which}
    finish_all(engine, list(requests.values()))
    return requests


def with_min(params: SamplingParams) -> SamplingParams:
    """What may end by itself must not before the last token but one."""
    return params if params.ignore_eos else replace(params, min_tokens=NUM_GENERATED - 1)


def take_turns(engine: Engine, _: int) -> list[Request]:
    """Two conversations at once whose second turns do not fit together: all requests, turn by turn."""
    first = [engine.add_request(PROMPTS[i][:20], GREEDY) for i in (2, 9)]
    finish_all(engine, first, release=False)
    second = [engine.continue_request(each, [each.output_ids[-1], *range(5)], GREEDY) for each in first]
    finish_all(engine, second)
    return [*first, *second]


def ask_poisoned(engine: Engine, poison: int) -> list[Request]:
    """Three with NaN in the tenth place, one cut short before it, two clean ones; one by one."""
    bad = [*PROMPTS[2][:9], poison, *PROMPTS[2][10:40]]
    requests = []
    for ids in (bad, bad, bad[:10], bad[:9], PROMPTS[6], PROMPTS[6]):
        requests.append(engine.add_request(ids, GREEDY))
        finish_all(engine, requests[-1:])
    return requests


@dataclass(frozen=True, eq=False)
class Reference:
    """The model, its greedy answers, and a token that none of PROMPTS and answers holds."""

    hf: LlamaForCausalLM
    checkpoint: str
    tokens: list[list[int]]
    poison: int


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("policies")
    may_end = next(i for i, params in enumerate(PARAMS) if not params.ignore_eos)
    with torch.inference_mode():
        hf = save_hf_llama(folder / "first", *HEADS)
        tokens = [hf_greedy(hf, ids, NUM_GENERATED) for ids in PROMPTS]
        eos = tokens[may_end][3]  # It would end early.
        hf = save_hf_llama(folder / "hf", *HEADS, eos_token_id=eos)  # The same weights again.
        tokens[may_end] = hf_greedy(hf, PROMPTS[may_end], NUM_GENERATED, [eos], until=NUM_GENERATED - 1)
    convert(folder / "hf", folder / "megatron")
    seen = {token for group in (*PROMPTS, *tokens) for token in group}
    poison = next(token for token in range(3, 251) if token not in seen)
    return Reference(hf, str(folder / "megatron"), tokens, poison)


@functools.cache
def findings(reference: Reference, grid: str) -> list[dict[str, Served]]:
    sp_size, tp_size = GRIDS[grid]
    return run_ranks(sp_size * tp_size, serve, reference.checkpoint, grid, reference.poison)


def leader(reference: Reference, grid: str, job: str) -> Served:
    return findings(reference, grid)[0][job]


def small_jobs(grid: str) -> list[str]:
    return [name for name, job in jobs_for(grid).items() if job.is_small and job.asks == "everything"]


each_grid = pytest.mark.parametrize("grid", GRIDS)


@each_grid
def test_tokens_equal_transformers_and_seeded_ones_those_of_a_roomy_engine(
    grid: str, reference: Reference
) -> None:
    roomy = leader(reference, "sp1", "roomy")
    drawn = [tokens for tokens, params in zip(roomy.tokens, PARAMS, strict=True) if params.temperature]
    assert drawn and all(tokens not in reference.tokens for tokens in drawn), "nothing was drawn"
    for job in [*small_jobs(grid), "roomy"]:
        served = leader(reference, grid, job)
        for i, params in enumerate(PARAMS):
            wanted = roomy.tokens[i] if params.temperature else reference.tokens[i]
            assert served.tokens[i] == wanted, f"{job}: prompt {i}, preempted {served.preemptions[i]} times"
        assert (sum(served.preemptions) > 0) == (job != "roomy"), job


@each_grid
def test_seeds_and_min_tokens_were_preempted_and_prefixes_found(grid: str, reference: Reference) -> None:
    """The tokens above prove little unless what they are of did happen."""
    names = small_jobs(grid)
    served = [leader(reference, grid, job) for job in names]
    special = [i for i, params in enumerate(PARAMS) if params.temperature or not params.ignore_eos]
    assert grid == "tp2" or all(any(each.preemptions[i] for each in served) for i in special)
    for name, each in zip(names, served, strict=True):
        assert (sum(each.num_cached) > 0) == ("prefix" in name), name
        assert (each.num_swapped > 0) == ("swap" in name or name == "csa"), name
        if "sps2" in name:
            assert each.local_rows and bool(each.spread_rows) == (grid in ("sp2", "sp3")), name
        assert "sarathi" not in name or each.largest_chunk <= 48
    assert grid == "tp2" or leader(reference, grid, "sps2 recompute").num_pauses


@each_grid
def test_prompt_logprobs_are_the_log_softmax_of_the_logits(grid: str, reference: Reference) -> None:
    """Of local and of spread prompts, whole and in chunks, and computed again after a preemption."""
    scored = [i for i, params in enumerate(PARAMS) if params.prompt_logprobs]
    served = [leader(reference, grid, job) for job in [*small_jobs(grid), "roomy"]]
    assert any(each.preemptions[i] for each in served for i in scored)
    for each, i in itertools.product(served, scored):
        ids, found = PROMPTS[i], each.prompt_logprobs[i]
        with torch.inference_mode():
            rows = reference.hf(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        assert len(found) == len(ids) and found[0] is None
        for place, token in enumerate(found[1:]):
            assert token and token.token_id == ids[place + 1]
            assert token.logprob == pytest.approx(rows[place, token.token_id].item(), abs=LOGPROB_TOLERANCE)
            top = rows[place].topk(2)
            assert [number for number, _ in token.top_logprobs] == top.indices.tolist()
            assert [p for _, p in token.top_logprobs] == pytest.approx(
                top.values.tolist(), abs=LOGPROB_TOLERANCE
            )
    for each in served:
        assert [bool(found) for found in each.prompt_logprobs] == [params == SCORED for params in PARAMS]


@each_grid
def test_every_block_and_every_request_is_given_back_on_every_rank(grid: str, reference: Reference) -> None:
    for rank, jobs in enumerate(findings(reference, grid)):
        assert {name: served.left for name, served in jobs.items() if served.left} == {}, f"rank {rank}"
    for name, served in findings(reference, grid)[0].items():
        assert served.leaked == [0] * len(findings(reference, grid)), name


@each_grid
def test_turns_that_do_not_fit_together_are_swapped_and_equal_a_fresh_prefill(
    grid: str, reference: Reference
) -> None:
    served = leader(reference, grid, "turns")
    for which, number in enumerate((2, 9)):
        ids = PROMPTS[number][:20]
        with torch.inference_mode():
            first = hf_greedy(reference.hf, ids, NUM_GENERATED)
            second = hf_greedy(reference.hf, [*ids, *first, *range(5)], NUM_GENERATED)
        assert (served.tokens[which], served.tokens[2 + which]) == (first, second)
    # At sp 3 the shards are so small that the younger one waits for the older one's end.
    assert served.preemptions[:3] == [0, 0, 0] and (served.num_swapped or grid == "sp3")


@each_grid
def test_what_was_poisoned_is_not_shared(grid: str, reference: Reference) -> None:
    served = leader(reference, grid, "poison")
    error, length = FinishReason.ERROR, FinishReason.LENGTH
    assert served.reasons == [error, error, error, length, length, length]
    assert served.num_cached[:3] == [0, 0, 0], "even the blocks before the poison are not known"
    assert served.tokens[4] == served.tokens[5] == reference.tokens[6]
    assert served.num_cached[5] == 200 // BLOCK * BLOCK - BLOCK, "all but the block of the last token"


def test_short_prompts_send_nothing_and_only_spread_rows_travel(reference: Reference) -> None:
    model, ranks = load_model_config(reference.checkpoint), findings(reference, "sp2")
    traffic = Traffic(model=model, parallel=ParallelConfig(sp_size=2), element_size=4)

    def sent(job: str, what: str) -> int:
        return sum(rank[job].bytes_sent[what] for rank in ranks)

    short = ranks[0]["short"]
    assert short.tokens == ranks[0]["roomy"].tokens and None not in short.homes
    assert set(short.homes) == {0, 1} and short.local_rows and not short.spread_rows
    assert sent("short", "prefill") == sent("short", "decode") == sent("short", "moved") == 0
    mixed = ranks[0]["roomy"]
    assert mixed.local_rows and mixed.spread_rows and mixed.moved_rows
    assert {home is None for home in mixed.homes} == {True, False}
    # Linear in the number of rows; over both ranks.
    assert sent("roomy", "decode") == 2 * model.num_layers * traffic.decode(mixed.spread_rows)
    assert sent("roomy", "moved") == model.num_layers * traffic.moved_kv(mixed.moved_rows)


def test_control_without_exchange_spread_requests_are_wrong_and_local_ones_right(
    reference: Reference,
) -> None:
    served, roomy = leader(reference, "sp2", "skipped"), leader(reference, "sp2", "roomy")
    for i, tokens in enumerate(served.tokens):
        is_local = served.homes[i] is not None
        assert (tokens == roomy.tokens[i]) == is_local, f"prompt {i} of {len(PROMPTS[i])} tokens"
