"""An fp8 KV cache: tokens are those of a model that attends to rounded keys, by any policy and on any grid.

What a prompt attends to and what its answer reads are the same numbers, so that chunks, preemptions, next
turns and ranks change nothing. transformers with rounded keys and values is the reference.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from transformers import PreTrainedModel

from checkpoints_tools.convert import convert
from megatron_sps2.attention.core import SequenceParallelAttention, StepContext
from megatron_sps2.attention.kv_cache import KVCache
from megatron_sps2.config import KVCacheDType, ParallelConfig
from megatron_sps2.engine.build import assemble
from megatron_sps2.model.checkpoint import load_gpt
from megatron_sps2.parallel.groups import ParallelGroups
from tests.families import save_family
from tests.ranks import run_ranks
from tests.rounded_attention import round_keys_and_values
from tests.test_engine import hf_greedy
from tests.test_policies_exact import CSA, HEADS, NUM_GENERATED, PROMPTS, Job, Served, run_job, schedule
from tests.test_windows import ASKED, WINDOW
from tests.tiny_llama import save_hf_llama

# (sp, tp)
GRIDS = {"sp1": (1, 1), "sp2": (2, 1), "sp3": (3, 1), "tp2": (1, 2)}
JOBS = {
    "sps2, recompute": Job(schedule("sps2")),
    "sps2, prefixes, swap": Job(schedule("sps2", prefix_caching=True, preemption="swap")),
    "sarathi, chunks of 48, swap": Job(schedule("sarathi", preemption="swap")),
    "sarathi, chunks of 20, prefixes": Job(
        schedule("sarathi", max_num_batched_tokens=20, prefix_caching=True)
    ),
    "fcfs": Job(schedule("fcfs"), is_small=False),
    "csa": Job(schedule("sps2"), csa=CSA),
    "turns": Job(schedule("sps2", short_prompt_tokens=0), asks="turns"),
}
WINDOWED_JOBS = {
    name: JOBS[name] for name in ("sps2, recompute", "sarathi, chunks of 48, swap", "fcfs", "turns")
}
Jobs = dict[str, Job]


class Reference:
    """A model, and its answers with rounded keys and values."""

    def __init__(self, hf: PreTrainedModel, folder: Path) -> None:
        convert(folder / "hf", folder / "megatron")
        self.hf, self.checkpoint = hf, str(folder / "megatron")
        round_keys_and_values(hf)

    @functools.cache  # noqa: B019  # as long as the module's fixture
    def tokens(self, ids: tuple[int, ...]) -> list[int]:
        with torch.inference_mode():
            return hf_greedy(self.hf, ids, NUM_GENERATED)  # type: ignore[arg-type]

    def all_tokens(self) -> list[list[int]]:
        return [self.tokens(tuple(PROMPTS[i])) for i in ASKED]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("fp8")
    return Reference(save_hf_llama(folder / "hf", *HEADS), folder)


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("fp8-windows")
    return Reference(save_family("gemma3", folder / "hf", sliding_window=WINDOW), folder)


@contextmanager
def attending_to_what_was_not_rounded() -> Iterator[None]:
    """The cache keeps rounded rows all the same: a prompt and its answer see different keys."""
    with mock.patch.object(KVCache, "is_rounded", False):
        yield


def serve(
    checkpoint: str, grid: str, jobs: Jobs, kept: KVCacheDType, unrounded: bool = False
) -> dict[str, Served]:
    """On a rank: every job."""
    sp_size, tp_size = GRIDS[grid]
    parallel = ParallelConfig(sp_size=sp_size, tp_size=tp_size)
    groups, found = ParallelGroups.create(parallel), {}
    for name, job in jobs.items():
        context = StepContext()
        core = functools.partial(SequenceParallelAttention, context=context)
        forward = load_gpt(checkpoint, groups.to_megatron(), core, torch.float32)
        config = replace(job.config(checkpoint, parallel), kv_cache_dtype=kept)
        engine = assemble(config, groups, forward, context)
        if unrounded:
            with attending_to_what_was_not_rounded():
                found[name] = run_job(engine, job, 0)
        else:
            found[name] = run_job(engine, job, 0)
    return found


def served_on(
    reference: Reference, grid: str, jobs: Jobs, kept: KVCacheDType = "fp8", unrounded: bool = False
) -> list[dict[str, Served]]:
    """Of every rank."""
    sp_size, tp_size = GRIDS[grid]
    return run_ranks(sp_size * tp_size, serve, reference.checkpoint, grid, jobs, kept, unrounded)


def check(reference: Reference, ranks: list[dict[str, Served]], jobs: Jobs) -> None:
    served = ranks[0]
    for name, job in jobs.items():
        if job.asks == "turns":
            continue
        for i in ASKED:
            wanted = reference.tokens(tuple(PROMPTS[i]))
            assert served[name].tokens[i] == wanted, f"{name}: prompt {i} of {len(PROMPTS[i])} tokens"
    for which, number in enumerate((2, 9)):
        ids = PROMPTS[number][:20]
        first = reference.tokens(tuple(ids))
        second = reference.tokens((*ids, *first, *range(5)))
        assert (served["turns"].tokens[which], served["turns"].tokens[2 + which]) == (first, second)
    for rank in ranks:
        assert {name: each.left for name, each in rank.items() if each.left} == {}


@pytest.mark.parametrize("grid", GRIDS)
def test_every_way_of_serving_equals_a_model_that_attends_to_rounded_keys(
    grid: str, llama: Reference
) -> None:
    ranks = served_on(llama, grid, JOBS)
    check(llama, ranks, JOBS)
    served = ranks[0]
    assert sum(served["sps2, recompute"].preemptions), "nothing was computed again"
    assert served["sarathi, chunks of 48, swap"].num_swapped, "nothing was swapped"
    assert sum(served["sps2, prefixes, swap"].num_cached), "no prefix was found"
    assert served["sarathi, chunks of 20, prefixes"].largest_chunk <= 20


@pytest.mark.parametrize("grid", ["sp1", "sp2", "sp3"])
def test_windowed_layers_attend_to_rounded_keys_too(grid: str, windowed: Reference) -> None:
    check(windowed, served_on(windowed, grid, WINDOWED_JOBS), WINDOWED_JOBS)


def test_control_prompts_that_attend_to_what_was_not_rounded_answer_otherwise(llama: Reference) -> None:
    jobs = {"fcfs": JOBS["fcfs"]}
    served = served_on(llama, "sp2", jobs, unrounded=True)[0]["fcfs"]
    wrong = [i for i in ASKED if served.tokens[i] != llama.tokens(tuple(PROMPTS[i]))]
    assert len(wrong) > len(ASKED) / 2, "the tests above would not notice"


def test_control_a_cache_that_is_not_rounded_answers_otherwise(llama: Reference) -> None:
    jobs = {"fcfs": JOBS["fcfs"]}
    served = served_on(llama, "sp1", jobs, kept="auto")[0]["fcfs"]
    wrong = [i for i in ASKED if served.tokens[i] != llama.tokens(tuple(PROMPTS[i]))]
    assert len(wrong) > len(ASKED) / 2
