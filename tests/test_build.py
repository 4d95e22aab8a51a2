"""Building an engine: what ranks must have been told alike, and the sizes that follow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from checkpoints_tools.convert import convert
from megatron_sps2.config import AttentionConfig, ParallelConfig, ScheduleConfig
from megatron_sps2.csa_setting import PRESETS
from megatron_sps2.engine.build import EngineConfig, build_engine
from tests.ranks import run_ranks
from tests.tiny_llama import save_hf_llama


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints of one shape; a single weight differs."""
    folder = tmp_path_factory.mktemp("twins")
    hf = save_hf_llama(folder / "hf", 4, 4)
    convert(folder / "hf", folder / "one")
    with torch.no_grad():
        hf.model.layers[1].mlp.down_proj.weight[3, 5] += 0.25
    hf.save_pretrained(folder / "hf")
    convert(folder / "hf", folder / "other")
    return folder / "one", folder / "other"


def complaint(configs: list[EngineConfig]) -> str:
    """On a rank: what building with its own config says."""
    try:
        build_engine(configs[dist.get_rank()])
    except RuntimeError as error:
        return str(error)
    return "built"


def test_ranks_with_the_same_settings_build(twins: tuple[Path, Path]) -> None:
    config = EngineConfig(checkpoint=str(twins[0]), parallel=ParallelConfig(sp_size=2))
    assert run_ranks(2, complaint, [config, config]) == ["built", "built"]


def test_ranks_with_other_weights_of_the_same_shape_are_refused(twins: tuple[Path, Path]) -> None:
    configs = [EngineConfig(checkpoint=str(path), parallel=ParallelConfig(sp_size=2)) for path in twins]
    said = run_ranks(2, complaint, configs)
    assert said[0] == said[1] and "rank 1 has weights=" in said[0] and "with the same flags" in said[0]


def test_ranks_with_another_dtype_are_refused(twins: tuple[Path, Path]) -> None:
    config = EngineConfig(checkpoint=str(twins[0]), parallel=ParallelConfig(sp_size=2))
    said = run_ranks(2, complaint, [config, replace(config, dtype="bfloat16")])
    assert said[0] == said[1] and "rank 1 has dtype='bfloat16' but rank 0 has 'float32'" in said[0]


@pytest.mark.parametrize("name", ["max_model_len", "block_size"])
def test_settings_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
        EngineConfig(checkpoint="", **{name: 0})  # type: ignore[arg-type]


def test_a_kv_cache_dtype_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="kv_cache_dtype='fp9' is not known; use one of auto, fp8"):
        EngineConfig(checkpoint="", kv_cache_dtype="fp9")  # type: ignore[arg-type]


@pytest.mark.parametrize("attention", [{"mode": "csa"}, {"mode": "auto"}, {"strategy": "pass_kv"}])
def test_chunks_need_exact_attention_that_follows_a_context(attention: dict[str, Any]) -> None:
    chosen, csa = AttentionConfig(**attention), PRESETS["default"]
    with pytest.raises(ValueError, match="chunks"):
        EngineConfig(checkpoint="", attention=chosen, csa=csa, schedule=ScheduleConfig(policy="sarathi"))
    EngineConfig(checkpoint="", attention=chosen, csa=csa, schedule=ScheduleConfig(policy="fcfs"))


@pytest.mark.parametrize("sp_size", [2, 3, 4])
def test_a_rank_of_p_holds_a_pth_of_the_cache(sp_size: int) -> None:
    """Within 10% at 16K tokens: blocks of 64 tokens and one more for the uneven end."""
    config = EngineConfig(checkpoint="", parallel=ParallelConfig(sp_size=sp_size), max_model_len=16384)
    assert config.sized_cache().tokens_per_rank == pytest.approx(16384 / sp_size, rel=0.1)
