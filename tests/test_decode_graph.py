"""Decode steps that are recorded and replayed, on CPU: what is replayed is a tape of tensor operations."""

from __future__ import annotations

import functools
import gc
import re
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch
from torch import Tensor

from checkpoints_tools.convert import convert
from megatron_sps2.attention.core import SequenceParallelAttention, StepContext
from megatron_sps2.attention.decode import RowHere
from megatron_sps2.attention.static_decode import StaticBatch
from megatron_sps2.config import ModelConfig, ParallelConfig
from megatron_sps2.engine import build
from megatron_sps2.engine.build import assemble, records_decode
from megatron_sps2.engine.decode_graph import DecodeGraphs, bucket_sizes
from megatron_sps2.engine.engine import Engine
from megatron_sps2.engine.engine_config import EngineConfig
from megatron_sps2.model.checkpoint import load_gpt
from megatron_sps2.model.gpt import GptForward
from megatron_sps2.ops.append import append_roped
from megatron_sps2.ops.kernel_set import TORCH, Kernels
from megatron_sps2.ops.paged import attend_paged_reference, slot_runs
from megatron_sps2.parallel.groups import ParallelGroups
from megatron_sps2.parallel.traffic import Traffic
from tests.families import save_family
from tests.ranks import RankFailed, run_ranks
from tests.tape import Tape
from tests.test_policies_exact import Job, Served, run_job, schedule

RECORDABLE = replace(TORCH, append_roped=append_roped, attend_paged=attend_paged_reference)
FAMILIES: dict[str, dict[str, int]] = {"gemma3": {"sliding_window": 20}, "gpt2": {}}
# Two conversations at once whose second turns do not fit together: one is preempted and comes back.
TURNS = Job(schedule("sps2", short_prompt_tokens=0, max_num_seqs=2), asks="turns")
# Fourteen at a time, of 1 to 300 tokens, in a cache that does not hold all.
EVERYTHING = Job(schedule("sps2", preemption="swap"))
CACHED = Job(schedule("sps2", prefix_caching=True))
ROOMY = Job(schedule("sps2"), is_small=False)


@pytest.mark.parametrize("max_rows", [1, 2, 3, 8, 14, 64])
def test_every_batch_finds_a_size_that_is_recorded(max_rows: int) -> None:
    sizes = bucket_sizes(max_rows)
    assert sizes == sorted(set(sizes)) and sizes[-1] == max_rows and sizes[0] == 1


@pytest.mark.parametrize(
    ("device", "backend", "kernels", "num_ranks", "num_experts", "eager", "recorded"),
    [
        ("cuda:0", "gloo", RECORDABLE, 1, 0, False, True),
        ("cuda:0", "nccl", RECORDABLE, 1, 0, True, False),
        ("cuda:0", "nccl", RECORDABLE, 2, 0, False, True),
        ("cuda:0", "gloo", RECORDABLE, 2, 0, False, False),
        ("cuda:0", "nccl", RECORDABLE, 1, 4, False, False),
        ("cuda:0", "nccl", TORCH, 1, 0, False, False),
        ("cpu", "gloo", RECORDABLE, 1, 0, False, False),
    ],
)
def test_only_a_dense_model_on_cuda_devices_whose_messages_stay_there_is_recorded(
    device: str, backend: str, kernels: Kernels, num_ranks: int, num_experts: int, eager: bool, recorded: bool
) -> None:
    config = EngineConfig(checkpoint="", device=device, enforce_eager=eager)
    model = cast(ModelConfig, SimpleNamespace(num_experts=num_experts))
    assert records_decode(config, model, kernels, num_ranks, backend) is recorded


@dataclass
class Replayed:
    """On one rank."""

    launched: Served
    replayed: Served
    num_replays: int
    num_launched: int  # decode steps with more rows on a rank than were recorded
    bytes_booked: int  # of messages that only recorded steps send
    bytes_sent: int
    bytes_by_size: dict[int, int]
    bytes_by_formula: dict[int, int]


def serve(
    checkpoint: str, parallel: ParallelConfig, job: Job, spoil: Callable[[], None] | None, max_rows: int = 0
) -> Replayed:
    """On a rank: as ever, and replayed; `max_rows` are recorded, else as many as the job may have."""
    groups, rank = ParallelGroups.create(parallel), torch.distributed.get_rank()
    served, recorder, fits = list[Served](), Tape(), list[bool]()
    for kernels in (TORCH, RECORDABLE):
        engine, forward = make_engine(checkpoint, groups, job)
        if kernels is RECORDABLE:
            runner = engine._runner
            runner.kernels = kernels
            runner.warm_up_decode(recorder, max_rows=max_rows or job.schedule.max_num_seqs, max_tokens=500)
            runner.record_decode()
            assert not runner.check_recorded()
            recorder.num_replays = recorder.num_bytes = 0
            graphs = cast(DecodeGraphs, runner._graphs)
            graphs.fit = noting(graphs.fit, fits)  # type: ignore[method-assign]
            if spoil is not None:
                spoil()
        served.append(run_job(engine, job, rank))
    traffic = Traffic(model=forward.model, parallel=parallel, element_size=4)
    exchanges = ("gather_rows", "return_partials")
    return Replayed(
        *served,
        recorder.num_replays,
        fits.count(False),
        engine.ledger.total("decode", *exchanges) if all(fits) else recorder.num_bytes,
        recorder.num_bytes,
        {size: sum(sent.get(name, 0) for name in exchanges) for size, sent in graphs._sent.items()},
        {size: round(forward.num_layers * traffic.recorded_decode(size)) for size in graphs._sent},
    )


def noting(fit: Callable[[Iterable[int]], bool], fits: list[bool]) -> Callable[[Iterable[int]], bool]:
    def noted(homes: Iterable[int]) -> bool:
        fits.append(fit(homes))
        return fits[-1]

    return noted


def make_engine(checkpoint: str, groups: ParallelGroups, job: Job) -> tuple[Engine, GptForward]:
    context = StepContext()
    core = functools.partial(SequenceParallelAttention, context=context)
    forward = load_gpt(checkpoint, groups.to_megatron(), core, torch.float32)
    return assemble(job.config(checkpoint, groups.config), groups, forward, context), forward


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("graph")
    for family, changes in FAMILIES.items():
        save_family(family, folder / f"{family}-hf", **changes)
        convert(folder / f"{family}-hf", folder / family)
    return {family: str(folder / family) for family in FAMILIES}


def same(ranks: list[Replayed]) -> None:
    """The tokens, the bytes, and nothing left behind."""
    leader = ranks[0]
    assert leader.replayed.tokens == leader.launched.tokens and leader.num_replays > 10
    assert leader.replayed.leaked == leader.launched.leaked
    for rank in ranks:
        assert rank.replayed.left == rank.launched.left and rank.num_replays == leader.num_replays
        assert rank.bytes_booked == rank.bytes_sent
        assert rank.bytes_by_size == rank.bytes_by_formula


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_steps_give_the_tokens_of_steps_that_are_launched(
    family: str, checkpoints: dict[str, str]
) -> None:
    """Windows, and two ways of turning; learned positions, and none."""
    ranks = run_ranks(1, serve, checkpoints[family], ParallelConfig(), TURNS, None)
    same(ranks)
    assert max(ranks[0].replayed.preemptions)


@pytest.mark.parametrize(
    ("family", "job", "sp_size", "tp_size"),
    [
        ("gemma3", EVERYTHING, 2, 1),
        ("gpt2", CACHED, 3, 1),
        ("gpt2", TURNS, 1, 2),
        ("gemma3", TURNS, 2, 2),
    ],
)
def test_steps_of_several_ranks_are_replayed_with_their_exchanges(
    family: str, job: Job, sp_size: int, tp_size: int, checkpoints: dict[str, str]
) -> None:
    """Rows that stay at home, and rows that are spread, with new K and V that are kept elsewhere."""
    parallel = ParallelConfig(sp_size=sp_size, tp_size=tp_size)
    ranks = run_ranks(sp_size * tp_size, serve, checkpoints[family], parallel, job, None)
    same(ranks)
    seen = ranks[0].replayed
    assert max(seen.preemptions)
    if job is not TURNS:
        assert seen.spread_rows and seen.moved_rows and seen.local_rows and ranks[0].bytes_sent


def test_a_step_with_more_rows_on_a_rank_than_were_recorded_is_launched(checkpoints: dict[str, str]) -> None:
    """Two rows are recorded, one on a rank and twice as many; there are fourteen at once."""
    ranks = run_ranks(2, serve, checkpoints["gpt2"], ParallelConfig(sp_size=2), ROOMY, None, 2)
    same(ranks)
    assert ranks[0].num_launched > 5 and ranks[0].num_launched == ranks[1].num_launched


def send_nothing() -> None:
    StaticBatch._send = lambda *_: None  # type: ignore[method-assign]


def exchange_nothing() -> None:
    """Of replays: they call the operator, not torch.distributed."""
    Tape._run = skip_all_to_alls(Tape._run)  # type: ignore[method-assign]


def skip_all_to_alls(run: Any) -> Any:
    def skipping(tape: Tape, func: Any, args: Any, kwargs: Any, first: Any) -> None:
        if "alltoall" in func.__name__:
            args[0].zero_()
        else:
            run(tape, func, args, kwargs, first)

    return skipping


@pytest.mark.parametrize(("spoil", "sp_size"), [(send_nothing, 1), (send_nothing, 2), (exchange_nothing, 2)])
def test_control_numbers_or_messages_that_are_not_sent_anew_give_other_tokens(
    spoil: Callable[[], None], sp_size: int, checkpoints: dict[str, str]
) -> None:
    parallel = ParallelConfig(sp_size=sp_size)
    leader = run_ranks(sp_size, serve, checkpoints["gpt2"], parallel, TURNS, spoil)[0]
    assert len(leader.replayed.tokens) == len(leader.launched.tokens)
    assert leader.replayed.tokens != leader.launched.tokens


class Counting(Tape):
    num_recorded = 0

    def record(self, body: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.num_recorded += 1
        return super().record(body)


class OffAtFirst(Counting):
    """The size that is recorded first gives no numbers."""

    def record(self, body: Callable[[], Tensor]) -> Callable[[], Tensor]:
        replay, off = super().record(body), self.num_recorded == 1
        return lambda: replay() * torch.nan if off else replay()


class FailsAtLast(Counting):
    """A capture waits for nobody; here it runs, and a rank that fails earlier leaves the others waiting."""

    def record(self, body: Callable[[], Tensor]) -> Callable[[], Tensor]:
        replay = super().record(body)
        if self.num_recorded == len(bucket_sizes(EVERYTHING.schedule.max_num_seqs)):
            raise OSError("no graphs here")
        return replay


class FailsInAWarmUp(Tape):
    def warm_up(self, body: Callable[[], Tensor]) -> None:
        raise torch.OutOfMemoryError("no room")


class WarmsUp(Tape):
    def warm_up(self, body: Callable[[], Tensor]) -> None:
        body()


class ExchangesNothing(Tape):
    def _run(self, func: Any, *more: Any) -> None:
        skip_all_to_alls(Tape._run)(self, func, *more)


def record_with(checkpoint: str, recorders: dict[int, type[Tape]]) -> None:
    """On a rank, by rank: what records in place of CUDA."""
    groups = ParallelGroups.create(ParallelConfig(sp_size=2))
    engine, forward = make_engine(checkpoint, groups, EVERYTHING)
    engine._runner.kernels = RECORDABLE
    config = replace(EVERYTHING.config(checkpoint, groups.config), device="cuda:0")
    with (
        mock.patch.object(build, "CudaRecorder", recorders.get(groups.sp.rank, Tape)),
        mock.patch.object(build.dist, "get_backend", lambda: "nccl"),
    ):
        build.record_graphs(engine._runner, config, forward.model, groups)


@pytest.mark.parametrize(
    ("recorders", "told"),
    [
        (
            {1: OffAtFirst},
            "rank 1: .*--enforce-eager.*: a recorded decode step of 14 rows is off",
        ),
        ({1: FailsAtLast}, "rank 1: decode steps cannot be recorded here, .*OSError: no graphs here"),
        ({0: ExchangesNothing, 1: ExchangesNothing}, "a recorded decode step of .* rows is off"),
    ],
)
def test_recordings_that_are_off_or_fail_on_one_rank_end_the_start_on_all(
    recorders: dict[int, type[Tape]], told: str, checkpoints: dict[str, str]
) -> None:
    with pytest.raises(RankFailed, match=told):
        run_ranks(2, record_with, checkpoints["gpt2"], recorders, timeout_s=100)


def test_a_rank_that_fails_in_a_warm_up_ends_at_once(checkpoints: dict[str, str]) -> None:
    """The other waits for it in an exchange: what it might be told would come when its time is up."""
    told = "rank 1 raised.*lower --max-num-seqs: OutOfMemoryError: no room"
    with pytest.raises(RankFailed, match=re.compile(told, re.DOTALL)):
        run_ranks(2, record_with, checkpoints["gpt2"], {0: WarmsUp, 1: FailsInAWarmUp}, timeout_s=60)


def test_recordings_that_are_right_pass(checkpoints: dict[str, str]) -> None:
    run_ranks(2, record_with, checkpoints["gemma3"], {})


def test_after_its_last_plan_no_rank_keeps_what_was_recorded(checkpoints: dict[str, str]) -> None:
    """NCCL's communicators would wait for it for ever."""
    assert run_ranks(2, recorded_at_the_end, checkpoints["gpt2"]) == [(True, False)] * 2


def recorded_at_the_end(checkpoint: str) -> tuple[bool, bool]:
    """On a rank: whether a replay lives before and after the last plan; nothing is collected meanwhile."""
    groups = ParallelGroups.create(ParallelConfig(sp_size=2))
    engine, _ = make_engine(checkpoint, groups, TURNS)
    runner = engine._runner
    runner.kernels = RECORDABLE
    runner.warm_up_decode(Tape(), max_rows=2, max_tokens=500)
    runner.record_decode()
    held = weakref.ref(next(iter(cast(DecodeGraphs, runner._graphs)._replays.values())))
    gc.disable()
    before = held() is not None
    if engine.is_leader:
        engine.stop()
    else:
        engine.follow()
    return before, held() is not None


def test_rows_find_their_numbers_whatever_was_in_their_place() -> None:
    """Requests that stay, grow, leave and come, and sizes that change: as in a batch never filled before."""
    kept = StaticBatch(2, 4, max_blocks=6, block_size=4, device=torch.device("cpu"))
    growing, other = [7, 8], [3]
    steps = [
        (2, [[RowHere(30, growing, 0, 7)], [RowHere(-1, other, 1, 3), RowHere(9, [], 0, 0)]]),
        (2, [[RowHere(31, growing, 0, 8)], [RowHere(-1, other, 1, 3)]]),
        (4, [[RowHere(32, growing, 0, 9)], [RowHere(5, [1, 2, 3], 2, 12)]]),
        (1, [[RowHere(-1, other, 1, 3)], [RowHere(33, growing, 0, 10)]]),
        (4, [[], [RowHere(34, growing, 0, 11)]]),
    ]
    for i, (size, rows) in enumerate(steps):
        if i == 2:
            growing.append(9)
        fresh = StaticBatch(2, 4, max_blocks=6, block_size=4, device=torch.device("cpu"))
        for batch in (kept, fresh):
            batch.fill(size, [50 + i], [60 + i], rows)
        assert torch.equal(kept.inputs(size)[0], fresh.inputs(size)[0])
        (slots, shards, near), (wanted, wanted_shards, wanted_near) = kept.rows(size), fresh.rows(size)
        assert torch.equal(slots, wanted) and shards.runs == wanted_shards.runs
        assert near.runs == wanted_near.runs
        flat = [row for rank in rows for row in [*rank, *[RowHere(-1, [], 0, 0)] * (size - len(rank))]]
        assert slots.tolist() == [row.slot for row in flat]
        assert shards.runs == [slot_runs(row.blocks, 0, row.num_tokens, 4) for row in flat]
        assert near.runs == [slot_runs(row.blocks, row.first_near, row.num_tokens, 4) for row in flat]
