"""The whole engine gives the tokens of the torch set with every other set; Triton's by its interpreter."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
import torch

from checkpoints_tools.convert import convert
from megatron_sps2.config import (
    AttentionConfig,
    CacheConfig,
    KernelChoice,
    ParallelConfig,
    SamplingParams,
    ScheduleConfig,
)
from megatron_sps2.engine.build import build_engine
from megatron_sps2.engine.engine_config import EngineConfig
from tests.families import save_family
from tests.ranks import run_ranks
from tests.test_engine import finish_all
from tests.tiny_llama import prompt

TRITON = [
    pytest.mark.triton,
    pytest.mark.timeout(250),
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs on CPU tensors, in Triton's interpreter"),
]

PROMPTS = [prompt(length, seed=length).tolist() for length in (37, 5, 21)]
ASKED = SamplingParams(max_tokens=4, ignore_eos=True)


def answer(config: EngineConfig) -> list[list[int]]:
    """On a rank: everybody's tokens, and those of a second turn."""
    # Kernels are checked in test_kernel_check; by the interpreter that takes longer than all answers.
    with mock.patch("megatron_sps2.engine.kernel_check.check_kernels"):
        engine = build_engine(config)
    if not engine.is_leader:
        engine.follow()
        return []
    first = engine.add_request(PROMPTS[0], ASKED)
    others = [engine.add_request(ids, ASKED) for ids in PROMPTS[1:]]
    while first.finish_reason is None:
        engine.step()
    second = engine.continue_request(first, [first.output_ids[-1], *PROMPTS[1]], ASKED)
    finish_all(engine, [*others, second])
    engine.stop()
    return [each.output_ids for each in (first, *others, second)]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    """Two ranks, so that partial results travel; windows; rounded keys."""
    folder = tmp_path_factory.mktemp("kernels")
    save_family("gemma3", folder / "hf", sliding_window=9)
    convert(folder / "hf", folder / "megatron")
    return EngineConfig(
        checkpoint=str(folder / "megatron"),
        parallel=ParallelConfig(sp_size=2),
        max_model_len=120,
        schedule=ScheduleConfig(max_num_seqs=3),
        cache=CacheConfig(num_blocks=40, block_size=8),
        kv_cache_dtype="fp8",
    )


@pytest.fixture(scope="module")
def torch_tokens(config: EngineConfig) -> list[list[int]]:
    tokens = run_ranks(2, answer, replace(config, attention=AttentionConfig(kernels="torch")))[0]
    assert all(len(each) == ASKED.max_tokens for each in tokens)
    return tokens


@pytest.mark.parametrize("kernels", ["numba", pytest.param("triton", marks=TRITON)])
def test_tokens_are_those_of_the_torch_set(
    kernels: KernelChoice, config: EngineConfig, torch_tokens: list[list[int]]
) -> None:
    pytest.importorskip(kernels)
    asked = replace(config, attention=AttentionConfig(kernels=kernels))
    assert run_ranks(2, answer, asked)[0] == torch_tokens
