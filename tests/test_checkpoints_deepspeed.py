"""What DeepSpeed wrote of a Megatron-DeepSpeed training, module weights only."""

from __future__ import annotations

import argparse
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from checkpoints_tools.convert import convert
from checkpoints_tools.inspect import inspect
from checkpoints_tools.legacy import our_names
from tests.deepspeed_writer import how_to_merge, make_universal, write, write_pipeline
from tests.families import save_family
from tests.ranks import run_ranks

# Our names -> those of Megatron-DeepSpeed.
THEIRS = {
    "decoder.": "language_model.encoder.",
    "embedding.": "language_model.embedding.",
    "output_layer.": "language_model.output_layer.",
    "linear_qkv.": "query_key_value.",
    "linear_proj.": "dense.",
    "linear_fc1.": "dense_h_to_4h.",
    "linear_fc2.": "dense_4h_to_h.",
    "pre_mlp_layernorm.": "post_attention_layernorm.",
}
Shards = list[dict[str, Tensor]]


def their_shards(hf: Path, folder: Path, tp: int) -> tuple[Shards, argparse.Namespace]:
    """Of each tp rank its weights under Megatron-DeepSpeed's names, and its args."""
    convert(hf, folder, to="megatron-legacy", tp_size=tp)
    shards: Shards = []
    args: Any = None
    for path in sorted((folder / "release").glob("mp_rank_*/model_optim_rng.pt")):
        content = torch.load(path, weights_only=False)
        args = content["args"]
        shards.append({their_name(name): each for name, each in our_names(content["model"]).items()})
    args.normalization = args.normalization.lower()
    args.num_key_value_heads, args.num_experts, args.rope_theta = args.num_query_groups, [1], args.rotary_base
    for name in ("group_query_attention", "num_query_groups", "position_embedding_type", "rotary_base"):
        delattr(args, name)
    return shards, args


def their_name(name: str) -> str:
    for ours, theirs in THEIRS.items():
        name = name.replace(ours, theirs)
    return name


def their_layers(shard: dict[str, Tensor]) -> Shards:
    """A shard cut into the layers of a pipeline, which know neither their number nor the model's name."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, weight in shard.items():
        name = name.removeprefix("language_model.").removeprefix("encoder.").removeprefix("embedding.")
        layer = re.match(r"layers\.(\d+)\.|final_layernorm\.|output_layer\.", name)
        key = layer[0] if layer else "embedding"
        name = name.replace("output_layer.", "lm_head.") if key == "output_layer." else name.removeprefix(key)
        found.setdefault(key, {})[name] = weight
    return list(found.values())


def weights(folder: Path) -> dict[str, Tensor]:
    return {name: each for path in folder.glob("*.safetensors") for name, each in load_file(path).items()}


def is_same(hf: Path, checkpoint: Path, scratch: Path) -> bool:
    """Converts, and compares every weight bit by bit."""
    convert(checkpoint, scratch, to="hf")
    one, other = weights(hf), weights(scratch)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("name", "tp", "stage"), [("gpt2", 2, 1), ("llama2", 2, 2), ("smollm2", 1, 0)])
def test_zero_and_universal_give_the_same_bits(name: str, tp: int, stage: int, tmp_path: Path) -> None:
    save_family(name, tmp_path / "hf")
    shards, args = their_shards(tmp_path / "hf", tmp_path / "legacy", tp)
    run_ranks(tp, write, shards, args, str(tmp_path / "zero"), stage, how_to_merge(args))
    assert is_same(tmp_path / "hf", tmp_path / "zero", tmp_path / "out")
    assert inspect(tmp_path / "zero")["format"] == "deepspeed"
    if stage > 0:  # without ZeRO there is nothing to make universal
        make_universal(tmp_path / "zero" / "global_step1", tmp_path / "universal")
        for states in (tmp_path / "universal").glob("mp_rank_*"):
            content = torch.load(states, weights_only=False)
            content["args"].vocab_size = None  # as with most tokenizers: DeepSpeed alone knows it
            torch.save({**content, "module": None}, states)  # so that only zero/ can be read
        assert is_same(tmp_path / "hf", tmp_path / "universal", tmp_path / "out-universal")


@pytest.mark.parametrize(("name", "tp"), [("gpt2", 1), ("llama2", 2)])
def test_a_pipeline_gives_the_same_bits(name: str, tp: int, tmp_path: Path) -> None:
    save_family(name, tmp_path / "hf")
    shards, args = their_shards(tmp_path / "hf", tmp_path / "legacy", tp)
    layers = [their_layers(shard) for shard in shards]
    run_ranks(tp, write_pipeline, layers, args, str(tmp_path / "pipe"), how_to_merge(args))
    step = tmp_path / "pipe" / "global_step1"
    assert len(list(step.glob("layer_*"))) == tp * len(layers[0])
    assert is_same(tmp_path / "hf", tmp_path / "pipe", tmp_path / "out")
    make_universal(step, tmp_path / "universal")
    assert is_same(tmp_path / "hf", tmp_path / "universal", tmp_path / "out-universal")

    missing = min(step.glob(f"layer_04-model_{tp - 1:02d}*"))
    missing.unlink()
    with pytest.raises((FileNotFoundError, ValueError), match="layer_04 of some tp ranks|holds 1 layers"):
        convert(tmp_path / "pipe", tmp_path / "again", to="hf")


@pytest.fixture(scope="module")
def zero(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gated model's checkpoint, whose makers do not tell gate and up apart."""
    folder = tmp_path_factory.mktemp("zero")
    save_family("llama2", folder / "hf")
    shards, args = their_shards(folder / "hf", folder / "legacy", 2)
    run_ranks(2, write, shards, args, str(folder / "zero"), 1, how_to_merge(args, tells_halves=False))
    return folder / "zero"


def test_a_universal_checkpoint_that_mixes_gate_and_up_is_refused(zero: Path, tmp_path: Path) -> None:
    make_universal(zero / "global_step1", tmp_path / "universal")
    with pytest.raises(ValueError, match=r"dense_h_to_4h.weight/fp32.pt was merged .* rows are mixed"):
        convert(tmp_path / "universal", tmp_path / "out")


def test_control_mixed_gate_and_up_would_fit_in_shape(
    zero: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the check above: another model, and no error."""
    make_universal(zero / "global_step1", tmp_path / "universal")
    monkeypatch.setattr("checkpoints_tools.deepspeed._halves_are_cut", lambda args: False)
    assert not is_same(zero.parent / "hf", tmp_path / "universal", tmp_path / "out")


def test_what_is_missing_or_not_read_is_named(zero: Path, tmp_path: Path) -> None:
    step = tmp_path / "zero" / "global_step1"
    for change, message in (
        (lambda: (step / "mp_rank_00_model_states.pt").unlink(), "holds no mp_rank_00_model_states.pt"),
        (
            lambda: (step / "mp_rank_01_model_states.pt").unlink(),
            "the shards of tp 1, its args say tp 2",
        ),
        (
            lambda: (step / "mp_rank_01_model_states.pt").write_bytes(b"PK"),
            "mp_rank_01_model_states.pt .*read",
        ),
        (
            lambda: (step / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch(),
            r"written by ZeRO 3, .* ds_to_universal",
        ),
    ):
        shutil.rmtree(tmp_path / "zero", ignore_errors=True)
        shutil.copytree(zero, tmp_path / "zero")
        change()
        with pytest.raises((FileNotFoundError, ValueError), match=message):
            convert(tmp_path / "zero", tmp_path / "out")
    assert not (tmp_path / "out").exists()
