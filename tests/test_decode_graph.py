"""Decode steps that are recorded and replayed, on CPU: what is replayed is a trace of tensor operations.

As in a CUDA graph, nothing that the host knew when a step was recorded may matter when it runs again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from checkpoints_tools.convert import convert
from megatron_sps2.attention.core import SequenceParallelAttention, StepContext
from megatron_sps2.attention.static_decode import StaticBatch
from megatron_sps2.config import ModelConfig, ParallelConfig
from megatron_sps2.engine.build import assemble, records_decode
from megatron_sps2.engine.decode_graph import bucket_sizes
from megatron_sps2.engine.engine_config import EngineConfig
from megatron_sps2.model.checkpoint import load_gpt
from megatron_sps2.ops.append import append_roped
from megatron_sps2.ops.kernel_set import TORCH, Kernels
from megatron_sps2.ops.paged import attend_paged_reference
from megatron_sps2.parallel.groups import ParallelGroups
from tests.families import save_family
from tests.ranks import run_ranks
from tests.test_policies_exact import Job, Served, run_job, schedule

RECORDABLE = replace(TORCH, append_roped=append_roped, attend_paged=attend_paged_reference)
FAMILIES: dict[str, dict[str, int]] = {"gemma3": {"sliding_window": 20}, "gpt2": {}}
# Two conversations at once whose second turns do not fit together: one is preempted and comes back.
TURNS = Job(schedule("sps2", short_prompt_tokens=0, max_num_seqs=2), asks="turns")


@pytest.mark.parametrize("max_rows", [1, 2, 3, 8, 14, 64])
def test_every_batch_finds_a_size_that_is_recorded(max_rows: int) -> None:
    sizes = bucket_sizes(max_rows)
    assert sizes == sorted(set(sizes)) and sizes[-1] == max_rows and sizes[0] == 1


@pytest.mark.parametrize(
    ("device", "kernels", "num_ranks", "num_experts", "eager", "recorded"),
    [
        ("cuda:0", RECORDABLE, 1, 0, False, True),
        ("cuda:0", RECORDABLE, 1, 0, True, False),
        ("cuda:0", RECORDABLE, 2, 0, False, False),
        ("cuda:0", RECORDABLE, 1, 4, False, False),
        ("cuda:0", TORCH, 1, 0, False, False),
        ("cpu", RECORDABLE, 1, 0, False, False),
    ],
)
def test_only_a_dense_model_of_a_rank_alone_on_a_cuda_device_is_recorded(
    device: str, kernels: Kernels, num_ranks: int, num_experts: int, eager: bool, recorded: bool
) -> None:
    config = EngineConfig(checkpoint="", device=device, enforce_eager=eager)
    model = cast(ModelConfig, SimpleNamespace(num_experts=num_experts))
    assert records_decode(config, model, kernels, num_ranks) is recorded


class Traced:
    """As CudaRecorder: what is replayed are the operations that were seen, on the tensors that were there."""

    def __init__(self) -> None:
        self.num_replays = 0

    def __call__(self, body: Callable[[], Tensor]) -> Callable[[], Tensor]:
        trace = make_fx(body)()

        def replay() -> Tensor:
            self.num_replays += 1
            with torch.inference_mode():
                return trace()

        return replay


def serve(checkpoint: str, frozen: bool = False) -> tuple[Served, Served, int]:
    """As ever, and replayed; how often."""
    groups = ParallelGroups.create(ParallelConfig())
    served, recorder = list[Served](), Traced()
    for kernels in (TORCH, RECORDABLE):
        context = StepContext()
        core = functools.partial(SequenceParallelAttention, context=context)
        forward = load_gpt(checkpoint, groups.to_megatron(), core, torch.float32)
        config = TURNS.config(checkpoint, ParallelConfig())
        engine = assemble(config, groups, forward, context)
        runner = engine._runner
        runner.kernels = kernels
        if kernels is RECORDABLE:
            runner.record_decode(recorder, max_rows=config.schedule.max_num_seqs, max_tokens=500)
            if frozen:
                StaticBatch._send = lambda *_: None  # type: ignore[method-assign]
        served.append(run_job(engine, TURNS, 0))
    return *served, recorder.num_replays


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("graph")
    for family, changes in FAMILIES.items():
        save_family(family, folder / f"{family}-hf", **changes)
        convert(folder / f"{family}-hf", folder / family)
    return {family: str(folder / family) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_steps_give_the_tokens_of_steps_that_are_launched(
    family: str, checkpoints: dict[str, str]
) -> None:
    """Windows, and two ways of turning; learned positions, and none."""
    plain, replayed, num_replays = run_ranks(1, serve, checkpoints[family])[0]
    assert replayed.tokens == plain.tokens
    assert (replayed.leaked, replayed.left) == (plain.leaked, plain.left)
    assert max(replayed.preemptions) and num_replays > 10


def test_control_numbers_that_are_not_sent_anew_give_other_tokens(checkpoints: dict[str, str]) -> None:
    plain, replayed, _ = run_ranks(1, serve, checkpoints["gpt2"], True)[0]
    assert len(replayed.tokens) == len(plain.tokens) and replayed.tokens != plain.tokens
