"""Converting a Hugging Face folder; logits are compared in test_model_forward.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from checkpoints_tools.convert import convert
from megatron_sps2.config import ModelConfig
from megatron_sps2.model.manifest import read_manifest
from tests.ranks import run_ranks
from tests.tiny_llama import forward, hf_config, load_plain, prompt, save_hf_llama

MISTRAL_FIELDS = (
    *("num_attention_heads", "num_key_value_heads", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("vocab_size", "max_position_embeddings", "rope_parameters", "initializer_range"),
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_hf_llama(tmp_path / "hf", 4, 2)
    return tmp_path / "hf"


def _change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _logits(folder: Path) -> np.ndarray:
    return forward(load_plain(folder), prompt(9)).numpy()


def test_a_sharded_folder_gives_the_model_that_transformers_reads(tmp_path: Path) -> None:
    hf = save_hf_llama(tmp_path / "hf", 8, 2, shard_size="40KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    seen: list[tuple[str, int, int]] = []
    model = convert(tmp_path / "hf", tmp_path / "out", progress=lambda *step: seen.append(step))
    assert model == ModelConfig(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=8,
        num_query_groups=2,
        head_dim=8,
        vocab_size=251,
        max_seq_len=512,
        norm_epsilon=1e-6,
        rotary_base=5000.0,
        bos_token_id=1,
        eos_token_ids=(2,),
    )
    assert seen[-1][1] == seen[-1][2] == len(seen)
    with torch.inference_mode():
        expected = hf(prompt(9)[None]).logits[0]
    (found,) = run_ranks(1, _logits, tmp_path / "out")
    # fp32 sums taken in another order.
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)


def test_tokenizer_files_are_carried_over_and_the_dtype_can_be_chosen(folder: Path, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "chat_template.jinja", "README.md"):
        (folder / name).write_text(name)
    convert(folder, tmp_path / "out", dtype="bfloat16")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "tokenizer.json"
    assert (tmp_path / "out" / "chat_template.jinja").exists()
    assert not (tmp_path / "out" / "README.md").exists()
    assert read_manifest(tmp_path / "out").dtype == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model_type": "qwen2_moe"},
            "model_type='qwen2_moe' is not supported: its MLPs are mixtures beside",
        ),
        ({"model_type": "qwen3_moe", "decoder_sparse_step": 2}, "decoder_sparse_step=2 is not supported"),
        ({"model_type": "qwen3_moe", "mlp_only_layers": [0]}, r"mlp_only_layers=\[0\] is not supported"),
        ({"model_type": "gpt_neox"}, "model_type='gpt_neox' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"sliding_window": 128}, "sliding_window=128 is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "has no 'low_freq_factor'"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": -1.0}}, "factor=-1.0 must be above 0"),
        ({"rope_parameters": None, "rope_scaling": {"type": "longrope", "factor": 2.0}}, "type 'longrope'"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is not supported"),
        ({"num_key_value_heads": 3}, "num_attention_heads=4 is not a multiple of num_query_groups=3"),
        ({"dtype": "float64"}, "dtype='float64' is not one of"),
        ({"intermediate_size": 128}, r"mlp\.gate_proj\.weight has shape \(96, 32\), expected \(128, 32\)"),
        ({"num_hidden_layers": 3}, r"model\.layers\.2\.input_layernorm\.weight \(32,\) is missing"),
        ({"num_hidden_layers": 1}, r"model\.layers\.1\.\S+ \S+ .*is unexpected"),
    ],
)
def test_what_is_not_supported_or_does_not_fit_is_refused_by_name(
    folder: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    _change_config(folder, **changes)
    with pytest.raises(ValueError, match=message):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mistral_folder_gives_the_model_that_transformers_reads(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    values = {name: getattr(hf_config(4, 2), name) for name in MISTRAL_FIELDS}
    # A window as long as the model's context is not in use.
    hf = MistralForCausalLM(MistralConfig(**values, head_dim=8, sliding_window=512)).eval()
    hf.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "out")
    with torch.inference_mode():
        expected = hf(prompt(9)[None]).logits[0]
    (found,) = run_ranks(1, _logits, tmp_path / "out")
    # fp32 sums taken in another order.
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)


def test_a_config_without_a_needed_entry_is_named(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["rms_norm_eps"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="has no 'rms_norm_eps'"):
        convert(folder, tmp_path / "out")


def test_a_weight_missing_from_the_file_is_named(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight \(96, 32\) is missing"):
        convert(folder, tmp_path / "out")


def test_a_truncated_weight_file_is_named(folder: Path, tmp_path: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"model\.safetensors \(5000 bytes\) cannot be read"):
        convert(folder, tmp_path / "out")


def test_a_file_that_the_index_names_and_the_folder_lacks_is_named(tmp_path: Path) -> None:
    save_hf_llama(tmp_path / "hf", 8, 2, shard_size="40KB")
    gone = sorted((tmp_path / "hf").glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(FileNotFoundError, match=gone.name):
        convert(tmp_path / "hf", tmp_path / "out")


def test_a_folder_without_safetensors_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"hf has no \*\.safetensors"):
        convert(folder, tmp_path / "out")


def test_a_source_that_is_nothing_known_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(ValueError, match="no .gguf or llama2.c file, no folder with config.json"):
        convert(tmp_path / "empty", tmp_path / "out")
    with pytest.raises(ValueError, match="dtype='int8' is not known"):
        convert(tmp_path / "empty", tmp_path / "out", dtype="int8")  # type: ignore[arg-type]


def test_a_checkpoint_is_replaced_only_by_force(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()  # an empty folder needs no force
    convert(folder, tmp_path / "out")
    (tmp_path / "out" / "old.txt").touch()
    with pytest.raises(FileExistsError, match="out is not empty.*--force"):
        convert(folder, tmp_path / "out")
    assert (tmp_path / "out" / "old.txt").exists()
    convert(folder, tmp_path / "out", force=True, dtype="bfloat16")
    assert read_manifest(tmp_path / "out").dtype == "bfloat16"
    assert not (tmp_path / "out" / "old.txt").exists()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_of_other_things_is_never_replaced(folder: Path, tmp_path: Path, force: bool) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "precious.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="mine is not empty and has no sps2_model.json.*never replaced"):
        convert(folder, tmp_path / "mine", force=force)
    with pytest.raises(FileExistsError, match="precious.txt is a file"):
        convert(folder, tmp_path / "mine" / "precious.txt", force=force)
    assert (tmp_path / "mine" / "precious.txt").read_text() == "mine"


def test_source_and_target_must_lie_apart(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    # A manifest makes the folders replaceable: only their place protects them.
    for place in (folder, tmp_path):
        (place / "sps2_model.json").touch()
    before = sorted(tmp_path.rglob("*"))
    targets = (
        folder,
        folder / "new",
        tmp_path,
        folder / ".." / "hf",
        tmp_path / "link",
        tmp_path / "link" / "new",
    )
    for target in targets:
        with pytest.raises(ValueError, match="one lies inside the other; give a DST outside SRC"):
            convert(folder, target, force=True)
    with pytest.raises(ValueError, match="give a DST outside SRC"):
        convert(folder / "model.safetensors", folder, force=True)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_failed_conversion_leaves_the_old_checkpoint(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(folder, tmp_path / "out")
    before = read_manifest(tmp_path / "out")

    def fail(self: object, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("checkpoints_tools.hf.HfSource.save_tokenizer", fail)
    with pytest.raises(OSError, match="disk full"):
        convert(folder, tmp_path / "out", force=True)
    assert read_manifest(tmp_path / "out") == before
    assert not list(tmp_path.glob(".*"))
