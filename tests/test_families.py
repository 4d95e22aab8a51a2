"""Every family that is served gives the logits and greedy tokens of transformers, at every grid that fits."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints_tools.convert import convert
from checkpoints_tools.families import FAMILIES, model_config
from megatron_sps2.config import ParallelConfig, ScheduleConfig
from megatron_sps2.engine.build import EngineConfig
from megatron_sps2.engine.rank_memory import num_weights
from megatron_sps2.model.weights import hf_shapes
from tests.families import FAMILY_MODELS, save_family
from tests.ranks import run_ranks
from tests.sharded_run import Prompt, logits_error, run_everything
from tests.tiny_llama import prompt

NUM_TOKENS, NUM_GENERATED = 600, 32
# Of the largest logit. fp32 in another order of sums.
TOLERANCE = 1e-4


class Reference:
    """A random model: its converted checkpoint, and what transformers makes of one prompt."""

    def __init__(self, name: str, folder: Path) -> None:
        hf = save_family(name, folder / "hf")
        self.checkpoint = folder / "megatron"
        self.model = convert(folder / "hf", self.checkpoint)
        ids = prompt(NUM_TOKENS, seed=1)
        self.prompts = [Prompt(ids.tolist(), list(range(NUM_TOKENS)))]
        with torch.inference_mode():
            self.logits = [hf(ids[None]).logits[0]]
            whole = hf.generate(
                ids[None],
                attention_mask=torch.ones_like(ids[None]),
                max_new_tokens=NUM_GENERATED,
                min_new_tokens=NUM_GENERATED,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        self.tokens = [whole[0, NUM_TOKENS:].tolist()]


@functools.cache
def reference(name: str, root: Path) -> Reference:
    return Reference(name, root / name)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def run(want: Reference, tp_size: int, sp_size: int) -> tuple[float, list[list[int]] | None]:
    """The error of our logits and our tokens."""
    config = EngineConfig(
        checkpoint=str(want.checkpoint),
        parallel=ParallelConfig(sp_size=sp_size, tp_size=tp_size),
        max_model_len=NUM_TOKENS + NUM_GENERATED,
        schedule=ScheduleConfig(),
    )
    results = run_ranks(sp_size * tp_size, run_everything, config, want.prompts, NUM_GENERATED)
    return logits_error(results, want.logits, want.prompts), results[0].tokens


CASES = [(name, *grid) for name, model in FAMILY_MODELS.items() for grid in model.grids]


@pytest.mark.parametrize(("name", "tp_size", "sp_size"), CASES)
def test_logits_and_greedy_tokens_equal_transformers(
    name: str, tp_size: int, sp_size: int, root: Path
) -> None:
    want = reference(name, root)
    error, tokens = run(want, tp_size, sp_size)
    assert error < TOLERANCE
    assert tokens == want.tokens


def test_every_family_is_tried() -> None:
    assert {model.model_type for model in FAMILY_MODELS.values()} == set(FAMILIES)


def test_older_and_newer_spellings_of_positions_mean_the_same() -> None:
    old: dict[str, Any] = json.loads(FAMILY_MODELS["llama3"].config().to_json_string(use_diff=False))
    rope = old.pop("rope_parameters")
    new = {**old, "rope_parameters": rope}
    old |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "llama3", **rope}}
    del old["rope_scaling"]["rope_theta"], old["rope_scaling"]["rope_type"]
    ours = [model_config(config, Path("config.json"), {}) for config in (old, new)]
    assert ours[0] == ours[1] and ours[0].rope_scaling is not None


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_the_doctor_counts_every_weight(name: str) -> None:
    config = json.loads(FAMILY_MODELS[name].config().to_json_string(use_diff=False))
    model = model_config(config, Path("config.json"), {})
    counted = sum(torch.Size(shape).numel() for shape in hf_shapes(model).values())
    assert num_weights(model, 1, output_copy=not model.tie_embeddings) == counted


def test_a_window_counts_only_where_it_is_used() -> None:
    config = json.loads(FAMILY_MODELS["qwen2"].config().to_json_string(use_diff=False))
    assert model_config({**config, "sliding_window": 64}, Path("c"), {}).max_seq_len == 1024
    assert model_config({**config, "sliding_window": 64}, Path("c"), {}).window is None
    used = {**config, "sliding_window": 64, "use_sliding_window": True, "layer_types": None}
    assert model_config({**used, "max_window_layers": 1}, Path("c"), {}).window_layers == (1,)
    assert model_config(used, Path("c"), {}).window is None  # from layer 28 on: there is none
    gemma = json.loads(FAMILY_MODELS["gemma3"].config().to_json_string(use_diff=False))
    long = model_config({**gemma, "sliding_window": 4096}, Path("c"), {})
    assert long.window_layers == (0, 2), "they turn by a base of their own, however long the window"
    with pytest.raises(ValueError, match="sliding_window=64 is not supported: a llama model must say"):
        model_config({**used, "model_type": "llama"}, Path("c"), {})
    with pytest.raises(ValueError, match="layer_types has 'chunked_attention'"):
        model_config({**used, "layer_types": ["chunked_attention"] * 2}, Path("c"), {})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("llama3", {"rope_scaling": None}),
        ("llama-linear", {"rope_scaling": None}),
        ("qwen2-yarn", {"rope_scaling": None}),
        ("smollm3", {"no_rope_layers": []}),
        ("mixtral", {"normalize_experts": False}),
        ("mistral-window", {"window": 129}),
        ("gemma3", {"window_rotary_base": None}),
        ("gemma3", {"attention_scalar": None}),
        ("gemma3", {"window": 69}),
        ("qwen3-moe", {"experts_per_token": 2}),
    ],
)
def test_control_without_what_makes_the_family_logits_are_wrong(
    name: str, change: dict[str, Any], root: Path
) -> None:
    want = reference(name, root)
    manifest = want.checkpoint / "sps2_model.json"
    whole = manifest.read_text()
    content = json.loads(whole)
    content["model"].update(change)
    manifest.write_text(json.dumps(content))
    try:
        assert run(want, 1, 1)[0] > 10 * TOLERANCE
    finally:
        manifest.write_text(whole)
