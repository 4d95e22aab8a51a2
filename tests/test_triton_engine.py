"""The whole engine with the Triton kernels, by their interpreter on CPU: the tokens of the torch set."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from checkpoints_tools.convert import convert
from megatron_sps2.config import AttentionConfig, CacheConfig, ParallelConfig, SamplingParams, ScheduleConfig
from megatron_sps2.engine.build import build_engine
from megatron_sps2.engine.engine_config import EngineConfig
from tests.families import save_family
from tests.ranks import run_ranks
from tests.test_engine import finish_all
from tests.tiny_llama import prompt

pytest.importorskip("triton")
pytestmark = [pytest.mark.triton, pytest.mark.timeout(250)]

PROMPTS = [prompt(length, seed=length).tolist() for length in (37, 5, 21)]
ASKED = SamplingParams(max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module", params=["smollm3", "gemma3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Layers that turn nothing; windows."""
    folder: Path = tmp_path_factory.mktemp("triton")
    save_family(request.param, folder / "hf", **({"sliding_window": 9} if request.param == "gemma3" else {}))
    convert(folder / "hf", folder / "megatron")
    return str(folder / "megatron")


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


@pytest.mark.parametrize("sp_size", [1, 2])
@pytest.mark.parametrize("kept", ["auto", "fp8"])
def test_tokens_are_those_of_the_torch_set(sp_size: int, kept: str, checkpoint: str) -> None:
    config = EngineConfig(
        checkpoint=checkpoint,
        parallel=ParallelConfig(sp_size=sp_size),
        max_model_len=120,
        schedule=ScheduleConfig(max_num_seqs=3),
        cache=CacheConfig(num_blocks=40, block_size=8),
        kv_cache_dtype=kept,  # type: ignore[arg-type]
    )
    torch_set, triton_set = (
        run_ranks(sp_size, answer, replace(config, attention=AttentionConfig(kernels=kernels)))[0]  # type: ignore[arg-type]
        for kernels in ("torch", "triton")
    )
    assert triton_set == torch_set and all(len(tokens) == ASKED.max_tokens for tokens in torch_set)
