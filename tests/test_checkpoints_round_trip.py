"""Checkpoints of one format to another and back: the same bits, at any tp and pp."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from checkpoints_tools.convert import convert
from checkpoints_tools.hf import HfSource
from checkpoints_tools.legacy_args import make_args, model_config
from megatron_sps2.model.manifest import read_manifest
from tests.families import save_family

FAMILIES = (
    "llama2",
    "llama-linear",
    "llama3",
    "qwen2",
    "qwen2-yarn",
    "qwen3",
    "smollm3",
    "smollm2",
    "gpt2",
    "mixtral",
    "mistral-window",
    "qwen3-moe",
    "qwen3-window",
    "gemma3",
)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: each for path in folder.glob("*.safetensors") for name, each in load_file(path).items()}


def equal(first: Path, second: Path) -> bool:
    """Every weight bit by bit."""
    one, other = weights(first), weights(second)
    return one.keys() == other.keys() and all(
        torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each family as Hugging Face has it."""
    found = {}
    for name in FAMILIES:
        found[name] = tmp_path_factory.mktemp(name) / "hf"
        save_family(name, found[name])
    return found


CASES = [
    *((name, tp, 1) for name in FAMILIES if name != "smollm2" for tp in (1, 2)),
    *((name, 1, 2) for name in FAMILIES if name not in ("smollm3", "gemma3")),
    ("llama2", 4, 1),
    ("gpt2", 4, 1),
    ("llama2", 4, 2),
    ("smollm2", 3, 1),
    ("smollm3", 2, 5),
]


@pytest.mark.parametrize(("name", "tp", "pp"), CASES)
def test_hf_core_legacy_core_hf_gives_the_same_bits(
    name: str, tp: int, pp: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    convert(folders[name], tmp_path / "core")
    convert(tmp_path / "core", tmp_path / "legacy", to="megatron-legacy", tp_size=tp, pp_size=pp)
    convert(tmp_path / "legacy", tmp_path / "again")
    convert(tmp_path / "again", tmp_path / "hf", to="hf")
    assert equal(folders[name], tmp_path / "hf")
    one, other = (read_manifest(tmp_path / each) for each in ("core", "again"))
    assert one.model == other.model and one.content_id == other.content_id
    shards = sorted(path.parent.name for path in tmp_path.glob("legacy/release/*/model_optim_rng.pt"))
    assert len(shards) == tp * pp


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_as_hugging_face_is_what_transformers_read_before(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Config and all: the same logits."""
    convert(folders[name], tmp_path / "core")
    convert(tmp_path / "core", tmp_path / "hf", to="hf")
    ids = torch.randint(251, (1, 600), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        logits = [
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
            for folder in (folders[name], tmp_path / "hf")
        ]
    assert torch.equal(*logits)


BEFORE_CORE = {
    "decoder.": "encoder.",
    "linear_qkv.": "query_key_value.",
    "linear_proj.": "dense.",
    "linear_fc1.": "dense_h_to_4h.",
    "linear_fc2.": "dense_4h_to_h.",
    "pre_mlp_layernorm.": "post_attention_norm.",
    "input_layernorm.": "input_norm.",
    "final_layernorm.": "final_norm.",
}
TRANSFORMER_ENGINE = {
    ".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
    ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_",
}


def rename(shard: Path, names: dict[str, str]) -> None:
    """As another Megatron wrote it; what came before core nested its weights."""
    content = torch.load(shard, weights_only=False)
    model: dict[str, Any] = {"decoder.layers.0.self_attention.core_attention._extra_state": None}
    for name, weight in content["model"].items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        model[name] = weight
    if names is BEFORE_CORE:
        parts: dict[str, dict[str, Any]] = {"embedding": {}, "encoder": {}, "output_layer": {}}
        for name, weight in model.items():
            part, rest = name.split(".", 1)
            parts.get(part, {})[rest] = weight
        model = {"language_model": {part: each for part, each in parts.items() if each}}
    torch.save({**content, "model": model}, shard)


@pytest.mark.parametrize("names", [BEFORE_CORE, TRANSFORMER_ENGINE], ids=["before core", "te"])
@pytest.mark.parametrize("name", ["llama2", "qwen2", "gpt2"])
def test_what_other_megatrons_wrote_is_read_by_its_own_args(
    name: str, names: dict[str, str], folders: dict[str, Path], tmp_path: Path
) -> None:
    convert(folders[name], tmp_path / "theirs", to="megatron-legacy", tp_size=2, pp_size=2)
    (tmp_path / "theirs" / "sps2_model.json").unlink()
    (tmp_path / "theirs" / "release").rename(tmp_path / "theirs" / "iter_0000042")
    (tmp_path / "theirs" / "latest_checkpointed_iteration.txt").write_text("42")
    for shard in (tmp_path / "theirs").rglob("*.pt"):
        rename(shard, names)
    convert(tmp_path / "theirs", tmp_path / "hf", to="hf")
    assert equal(folders[name], tmp_path / "hf")


@pytest.mark.parametrize("name", ["llama2", "llama-linear", "qwen2", "qwen3", "gpt2"])
def test_a_core_checkpoint_of_a_training_is_read_by_its_own_args(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """With what an optimizer leaves beside the weights, and a vocabulary padded for other tp ranks."""
    model = convert(folders[name], tmp_path / "theirs")
    (tmp_path / "theirs" / "sps2_model.json").unlink()
    (tmp_path / "theirs" / "release").rename(tmp_path / "theirs" / "iter_0000007")
    (tmp_path / "theirs" / "latest_checkpointed_iteration.txt").write_text("7\n")
    common = tmp_path / "theirs" / "iter_0000007" / "common.pt"
    args = make_args(model, "float32", 2, 1, padded=252)
    torch.save({"args": args, "iteration": 7, "opt_param_scheduler": {"num_steps": 7}}, common)
    convert(tmp_path / "theirs", tmp_path / "hf", to="hf")
    assert equal(folders[name], tmp_path / "hf")
    again = convert(tmp_path / "theirs", tmp_path / "again")
    assert again.rope_scaling == model.rope_scaling and again.qk_norm == model.qk_norm


def test_megatrons_fused_gelu_is_the_one_by_tanh(folders: dict[str, Path]) -> None:
    model = HfSource(folders["gpt2"]).model
    args = make_args(model, "float32", 1, 1, padded=251)
    args.openai_gelu = False  # as most trainings have it
    assert model_config(args, Path()).activation == model.activation == "gelu_tanh"
    args.bias_gelu_fusion = False
    assert model_config(args, Path()).activation == "gelu"


def test_args_that_do_not_fit_the_weights_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    model = convert(folders["qwen2"], tmp_path / "theirs")
    (tmp_path / "theirs" / "sps2_model.json").unlink()
    common = tmp_path / "theirs" / "release" / "common.pt"
    for change, message in (
        ({"add_qkv_bias": False}, "holds decoder.layers.self_attention.linear_qkv.bias, which"),
        ({"ffn_hidden_size": 48}, r"linear_fc1\.weight has shape \(192, 64\), expected \(96, 64\)"),
        ({"normalization": "LayerNorm"}, "are not served together"),
        ({"num_layers": 3}, "holds 2 layers of .*, not layer 2"),
        ({"qk_layernorm": True}, r"holds no decoder\.layers\.0\.self_attention\.q_layernorm\.weight"),
        ({"num_experts": 8}, r"holds no decoder\.layers\.0\.mlp\.router\.weight"),
        ({"num_experts": [4]}, r"args\.num_experts=\[4\] is not supported"),
        ({"no_rope_freq": 4}, r"args\.no_rope_freq=4 is not supported"),
        ({"apply_residual_connection_post_layernorm": True}, "post_layernorm=True is not supported"),
        ({"moe_router_load_balancing_type": "sinkhorn"}, "'sinkhorn' is not supported"),
        ({"moe_grouped_gemm": True}, r"args\.moe_grouped_gemm=True is not supported"),
    ):
        args = make_args(model, "float32", 1, 1, padded=251)
        vars(args).update(change)
        torch.save({"args": args}, common)
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / "theirs", tmp_path / "hf", to="hf")
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("is_archive", [True, False])
@pytest.mark.parametrize("name", ["llama3", "gpt2"])
def test_pickled_weights_in_several_files_give_the_same_bits(
    name: str, is_archive: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    """GPT-2 as it was first published: without the prefix, and with the masks beside the weights."""
    (tmp_path / "bin").mkdir()
    shutil.copyfile(folders[name] / "config.json", tmp_path / "bin" / "config.json")
    found = {key.removeprefix("transformer."): each for key, each in weights(folders[name]).items()}
    if name == "gpt2":
        found["h.0.attn.bias"] = torch.ones(1, 1, 1024, 1024).tril()
    file_of = {key: f"pytorch_model-{1 + i % 2}-of-2.bin" for i, key in enumerate(found)}
    for file in set(file_of.values()):
        part = {key: found[key] for key in found if file_of[key] == file}
        torch.save(part, tmp_path / "bin" / file, _use_new_zipfile_serialization=is_archive)
    (tmp_path / "bin" / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": file_of}))
    convert(tmp_path / "bin", tmp_path / "hf", to="hf")
    assert equal(folders[name], tmp_path / "hf")


def test_control_another_weight_is_noticed(folders: dict[str, Path], tmp_path: Path) -> None:
    other: Any = AutoModelForCausalLM.from_pretrained(folders["qwen2"], dtype=torch.float32)
    with torch.no_grad():
        other.model.layers[1].self_attn.k_proj.bias[3] += 1e-6
    other.save_pretrained(tmp_path)
    assert not equal(folders["qwen2"], tmp_path)
