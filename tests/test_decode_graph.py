"""Decode steps that are recorded and replayed, on CPU: what is replayed is a tape of tensor operations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch
from torch import Tensor

from checkpoints_tools.convert import convert
from megatron_sps2.attention.core import SequenceParallelAttention, StepContext
from megatron_sps2.attention.static_decode import StaticBatch
from megatron_sps2.config import ModelConfig, ParallelConfig
from megatron_sps2.engine import build
from megatron_sps2.engine.build import assemble, records_decode
from megatron_sps2.engine.decode_graph import bucket_sizes
from megatron_sps2.engine.engine_config import EngineConfig
from megatron_sps2.model.checkpoint import load_gpt
from megatron_sps2.ops.append import append_roped
from megatron_sps2.ops.kernel_set import TORCH, Kernels
from megatron_sps2.ops.paged import attend_paged_reference
from megatron_sps2.parallel.groups import ParallelGroups
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
    bytes_booked: int  # of messages that only recorded steps send
    bytes_sent: int


def serve(checkpoint: str, parallel: ParallelConfig, job: Job, spoil: Callable[[], None] | None) -> Replayed:
    """On a rank: as ever, and replayed."""
    groups, rank = ParallelGroups.create(parallel), torch.distributed.get_rank()
    served, recorder = list[Served](), Tape()
    for kernels in (TORCH, RECORDABLE):
        context = StepContext()
        core = functools.partial(SequenceParallelAttention, context=context)
        forward = load_gpt(checkpoint, groups.to_megatron(), core, torch.float32)
        config = job.config(checkpoint, parallel)
        engine = assemble(config, groups, forward, context)
        runner = engine._runner
        runner.kernels = kernels
        if kernels is RECORDABLE:
            runner.record_decode(recorder, max_rows=config.schedule.max_num_seqs, max_tokens=500)
            recorder.num_replays = recorder.num_bytes = 0
            if spoil is not None:
                spoil()
        served.append(run_job(engine, job, rank))
    booked = engine.ledger.total("decode", "gather_rows", "return_partials")
    return Replayed(*served, recorder.num_replays, booked, recorder.num_bytes)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("graph")
    for family, changes in FAMILIES.items():
        save_family(family, folder / f"{family}-hf", **changes)
        convert(folder / f"{family}-hf", folder / family)
    return {family: str(folder / family) for family in FAMILIES}


def same(ranks: list[Replayed]) -> None:
    """The tokens, and nothing left behind."""
    leader = ranks[0]
    assert leader.replayed.tokens == leader.launched.tokens and leader.num_replays > 10
    assert leader.replayed.leaked == leader.launched.leaked
    assert max(leader.replayed.preemptions)
    for rank in ranks:
        assert rank.replayed.left == rank.launched.left and rank.num_replays == leader.num_replays
        assert rank.bytes_booked == rank.bytes_sent


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_steps_give_the_tokens_of_steps_that_are_launched(
    family: str, checkpoints: dict[str, str]
) -> None:
    """Windows, and two ways of turning; learned positions, and none."""
    same(run_ranks(1, serve, checkpoints[family], ParallelConfig(), TURNS, None))


@pytest.mark.parametrize(
    ("family", "job", "sp_size", "tp_size"),
    [
        ("gemma3", EVERYTHING, 2, 1),
        ("gpt2", EVERYTHING, 3, 1),
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
    if job is EVERYTHING:
        seen = ranks[0].replayed
        assert seen.spread_rows and seen.moved_rows and seen.local_rows and ranks[0].bytes_sent


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


def record_wrongly(checkpoint: str, rank_off: int) -> None:
    """On a rank: what one of them replays is off."""
    groups, context = ParallelGroups.create(ParallelConfig(sp_size=2)), StepContext()
    core = functools.partial(SequenceParallelAttention, context=context)
    forward = load_gpt(checkpoint, groups.to_megatron(), core, torch.float32)
    config = replace(TURNS.config(checkpoint, ParallelConfig(sp_size=2)), device="cuda:0")
    engine = assemble(replace(config, device="cpu"), groups, forward, context)
    engine._runner.kernels = RECORDABLE
    scale = 1.5 if groups.sp.rank == rank_off else 1.0

    class Off(Tape):
        def __call__(self, body: Callable[[], Tensor]) -> Callable[[], Tensor]:
            replay = super().__call__(body)
            return lambda: replay() * scale

    with (
        mock.patch.object(build, "CudaRecorder", Off),
        mock.patch.object(build.dist, "get_backend", lambda: "nccl"),
    ):
        build.record_graphs(engine._runner, config, forward.model, groups)


def test_a_recording_that_is_off_on_one_rank_ends_the_start_on_all(checkpoints: dict[str, str]) -> None:
    run_ranks(2, record_wrongly, checkpoints["gpt2"], 2)  # on none
    told = (
        "rank 1: decode steps cannot be recorded here, use --enforce-eager: RuntimeError: a recorded decode"
    )
    with pytest.raises(RankFailed, match=told):
        run_ranks(2, record_wrongly, checkpoints["gpt2"], 1)
