"""The whole engine with the Triton kernels, by their interpreter on CPU: the tokens of the torch set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoints_tools.convert import convert
from megatron_sps2.config import (
    KERNEL_CHOICES,
    AttentionConfig,
    CacheConfig,
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

pytest.importorskip("triton")
pytestmark = [
    pytest.mark.triton,
    pytest.mark.timeout(250),
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs on CPU tensors, in Triton's interpreter"),
]

PROMPTS = [prompt(length, seed=length).tolist() for length in (37, 5, 21)]
ASKED = SamplingParams(max_tokens=4, ignore_eos=True)


def answer(config: EngineConfig) -> list[list[int]]:
    """On a rank: everybody's tokens, and those of a second turn."""
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


def test_tokens_are_those_of_the_torch_set(tmp_path: Path) -> None:
    """Two ranks, so that partial results travel; windows; rounded keys; a turn onto the cache."""
    save_family("gemma3", tmp_path / "hf", sliding_window=9)
    convert(tmp_path / "hf", tmp_path / "megatron")
    config = EngineConfig(
        checkpoint=str(tmp_path / "megatron"),
        parallel=ParallelConfig(sp_size=2),
        max_model_len=120,
        schedule=ScheduleConfig(max_num_seqs=3),
        cache=CacheConfig(num_blocks=40, block_size=8),
        kv_cache_dtype="fp8",
    )
    found = {
        kernels: run_ranks(2, answer, replace(config, attention=AttentionConfig(kernels=kernels)))[0]
        for kernels in KERNEL_CHOICES[1:]
    }
    assert found["triton"] == found["torch"]
    assert all(len(tokens) == ASKED.max_tokens for tokens in found["torch"])
