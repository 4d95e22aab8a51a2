"""GGUF files of every served family are read to the bit; what is not understood is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from torch import Tensor

from checkpoints_tools.convert import convert
from checkpoints_tools.gguf import GgufSource, rows_to_hf
from checkpoints_tools.hf import HfSource
from checkpoints_tools.source import check_weights
from megatron_sps2.config import RopeScaling
from tests.families import save_family
from tests.gguf_writer import interleave, write_gguf

LLAMA31 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA31 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def _with_rope(folder: Path, rope: dict[str, Any]) -> Path:
    """A Hugging Face folder whose positions are scaled otherwise; its weights do not depend on them."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    return folder


@pytest.fixture
def hf(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A Hugging Face folder; of Llama, where a test does not say otherwise."""
    save_family(getattr(request, "param", "llama2"), tmp_path / "hf")
    return tmp_path / "hf"


def _check_comes_back(path: Path, hf: Path, target: Path) -> None:
    convert(path, target, to="hf")
    expected, found = HfSource(hf), HfSource(target)
    assert found.model == expected.model
    assert found.shapes == expected.shapes
    for name in expected.shapes:
        assert torch.equal(found.fetch(name), expected.fetch(name)), name


@pytest.mark.parametrize(
    "hf",
    ["llama2", "smollm2", "llama-linear", "mistral", "qwen2", "qwen2-yarn", "qwen3", "smollm3", "gpt2"],
    indirect=True,
)
def test_every_family_comes_back_with_its_config_and_weights(hf: Path, tmp_path: Path) -> None:
    _check_comes_back(write_gguf(tmp_path / "tiny.gguf", hf), hf, tmp_path / "back")


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_the_scaling_of_llama_3_is_told_from_its_tensor(hf: Path, tmp_path: Path, factor: float) -> None:
    _with_rope(hf, {**LLAMA31, "factor": factor})
    path = write_gguf(tmp_path / "tiny.gguf", hf)
    scaling = RopeScaling(kind="llama3", factor=factor, original_max_seq_len=8192)
    assert GgufSource(path).model.rope_scaling == scaling
    _check_comes_back(path, hf, tmp_path / "back")


@pytest.mark.parametrize(
    "rope",
    [
        {"factor": 16.0},
        {"factor": 8.01},
        {"high_freq_factor": 3.0},
        {"original_max_position_embeddings": 256},
    ],
)
def test_a_scaling_that_is_not_llama_3s_is_refused(hf: Path, tmp_path: Path, rope: dict[str, Any]) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", _with_rope(hf, {**LLAMA31, **rope}))
    with pytest.raises(ValueError, match=r"rope_freqs\.weight of shape \(4,\), 1 to .* is not supported"):
        GgufSource(path)


def test_a_factor_without_a_type_is_linear(hf: Path, tmp_path: Path) -> None:
    for name, add in {
        "new": lambda w: w.add_rope_scaling_factor(2.5),
        "old": lambda w: w.add_float32("llama.rope.scale_linear", 2.5),
    }.items():
        scaling = GgufSource(write_gguf(tmp_path / f"{name}.gguf", hf, change=add)).model.rope_scaling
        assert scaling is not None and (scaling.kind, scaling.factor) == ("linear", 2.5)


def test_yarn_says_its_ramp(hf: Path, tmp_path: Path) -> None:
    def yarn(writer: GGUFWriter) -> None:
        writer.add_string("llama.rope.scaling.type", "yarn")
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_yarn_beta_fast(16.0)
        writer.add_rope_scaling_yarn_beta_slow(2.0)

    model = GgufSource(write_gguf(tmp_path / "tiny.gguf", hf, change=yarn)).model
    assert model.rope_scaling is not None
    assert (model.rope_scaling.beta_fast, model.rope_scaling.beta_slow) == (16.0, 2.0)
    assert model.rope_scaling.original_max_seq_len == 1024 and model.max_seq_len == 4096


@pytest.mark.parametrize("hf", ["smollm3", "qwen3", "gpt2"], indirect=True)
def test_quantised_weights_are_those_of_their_rows(hf: Path, tmp_path: Path) -> None:
    kind = GGMLQuantizationType.Q8_0
    source = GgufSource(write_gguf(tmp_path / "tiny.gguf", hf, kind=kind))
    for name, weight in load_file(hf / "model.safetensors").items():
        in_out = name.startswith("transformer.h.") and weight.ndim == 2
        rows = (weight.T if in_out else weight).contiguous().numpy()
        if weight.ndim == 2:
            rows = dequantize(quantize(rows, kind), kind)
        assert torch.equal(source.fetch(name), torch.from_numpy(rows.T if in_out else rows)), name
        # Q8_0: 127 steps up to the largest of 32 neighbours, its scale in fp16; half a step off at most.
        torch.testing.assert_close(source.fetch(name), weight, atol=float(weight.abs().max()) / 200, rtol=0)


@pytest.mark.parametrize("hf", ["llama2", "smollm3"], indirect=True)
def test_control_rows_left_in_hugging_faces_order_become_other_rows(hf: Path, tmp_path: Path) -> None:
    source = GgufSource(write_gguf(tmp_path / "tiny.gguf", hf, interleaved=False))
    weights = load_file(hf / "model.safetensors")
    wrong = {name for name, weight in weights.items() if not torch.equal(source.fetch(name), weight)}
    assert wrong == {name for name in weights if name.endswith(("q_proj.weight", "k_proj.weight"))}


def test_rows_are_turned_back() -> None:
    q = torch.randn(32, 16)
    assert torch.equal(rows_to_hf(interleave(q, 4), 4), q)


@pytest.mark.parametrize("hf", ["gpt2"], indirect=True)
def test_an_output_weight_of_its_own_unties_a_model(hf: Path, tmp_path: Path) -> None:
    output = torch.randn(251, 64)
    path = write_gguf(
        tmp_path / "tiny.gguf", hf, change=lambda w: w.add_tensor("output.weight", output.numpy())
    )
    source = GgufSource(path)
    assert not source.model.tie_embeddings
    check_weights(source)
    assert torch.equal(source.fetch("lm_head.weight"), output)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.add_expert_count(8), "llama.expert_count=8 is not supported: mixtures of experts"),
        (lambda w: w.add_string("llama.rope.scaling.type", "longrope"), "scaling.type='longrope' is not"),
        (
            lambda w: w.add_rope_scaling_yarn_attn_factor(1.2),
            r"yarn_attn_factor=1\.2 is not supported: llama.cpp and",
        ),
        (lambda w: w.add_rope_scaling_attn_factors(1.2), r"rope\.scaling\.attn_factor=1\.2 is not supported"),
        (
            lambda w: w.add_rope_dimension_count(4),
            "dimension_count=4 is not supported: it must be head_dim=8",
        ),
        (lambda w: w.add_value_length(16), "value_length=16 is not supported: it must be head_dim=8"),
        (lambda w: w.add_sliding_window(512), "sliding_window=512 is not supported: it does not say"),
        (
            lambda w: w.add_attention_scale(0.5),
            r"llama\.attention\.scale=0\.5 is not supported: nothing here",
        ),
        (lambda w: w.add_causal_attention(False), r"attention\.causal=False is not supported"),
        (lambda w: w.add_string("llama.made.up", "yes"), r"llama\.made\.up='yes' is not supported"),
        (lambda w: w.add_head_count_kv([8, 4]), r"head_count_kv=\[8, 4\] .*not the same in every layer"),
        (lambda w: w.add_type("adapter"), "general.type='adapter' is not supported"),
        (lambda w: w.add_uint16("split.count", 3), "is one of 3 files; join them"),
        (
            lambda w: w.kv_data[0].pop("llama.block_count"),
            "has no metadata 'llama.block_count', which a llama",
        ),
        (lambda w: w.kv_data[0].pop("llama.attention.layer_norm_rms_epsilon"), "no metadata .*rms_epsilon'"),
        (
            lambda w: (
                w.add_rope_scaling_factor(2.0),
                w.add_tensor("rope_freqs.weight", np.ones(4, np.float32)),
            ),
            "rope_freqs.weight beside rope.scaling.type='linear'",
        ),
    ],
)
def test_what_is_not_supported_is_refused_by_name_and_value(
    hf: Path, tmp_path: Path, change: Callable[[GGUFWriter], Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        GgufSource(write_gguf(tmp_path / "tiny.gguf", hf, change=change))


def test_what_changes_nothing_is_no_reason_to_refuse(hf: Path, tmp_path: Path) -> None:
    def harmless(writer: GGUFWriter) -> None:
        writer.add_expert_count(0)
        writer.add_sliding_window(1024)
        writer.add_string("llama.rope.scaling.type", "none")
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_finetuned(True)
        writer.add_rope_scaling_orig_ctx_len(256)
        writer.add_head_count([8, 8])
        writer.add_string("quantize.imatrix.file", "x")

    _check_comes_back(write_gguf(tmp_path / "tiny.gguf", hf, change=harmless), hf, tmp_path / "back")


@pytest.mark.parametrize("architecture", ["gemma3", "qwen3moe", "mistral3"])
def test_another_architecture_is_refused_by_name(hf: Path, tmp_path: Path, architecture: str) -> None:
    rename = lambda w: w.add_string("general.architecture", architecture)  # noqa: E731
    with pytest.raises(
        ValueError, match=f"general.architecture='{architecture}' is not supported; only llama"
    ):
        GgufSource(write_gguf(tmp_path / "tiny.gguf", hf, change=rename))


@pytest.mark.parametrize(
    ("hf", "extra"),
    [("llama2", "blk.0.attn_q.bias"), ("qwen2", "rope_freqs.weight"), ("gpt2", "blk.1.attn_q.weight")],
    indirect=["hf"],
)
def test_missing_and_unexpected_weights_are_named(hf: Path, tmp_path: Path, extra: str) -> None:
    def swap(writer: GGUFWriter) -> None:
        del writer.tensors[0]["blk.1.ffn_up.weight"]
        writer.add_tensor(extra, np.ones(4, np.float32))

    path = write_gguf(tmp_path / "tiny.gguf", hf, change=swap)
    with pytest.raises(ValueError, match=rf"(up_proj|c_fc)\.weight .*missing; {extra} \(4,\) is unexpected"):
        convert(path, tmp_path / "back", to="hf")


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.99])
def test_a_truncated_file_is_named(hf: Path, tmp_path: Path, kept: float) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", hf)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    with pytest.raises(ValueError, match=r"tiny\.gguf .*cannot be read as GGUF"):
        GgufSource(path)


@pytest.mark.slow
def test_smollm2_weights_and_tokenizer_equal_those_transformers_reads(
    smollm2_gguf: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = GgufSource(smollm2_gguf)
    check_weights(source)
    hf = AutoModelForCausalLM.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name, dtype=torch.float32
    )
    reference: dict[str, Tensor] = dict(hf.named_parameters())
    assert reference.keys() == source.shapes.keys()
    for name, weight in reference.items():
        assert torch.equal(source.fetch(name), weight), name
    assert source.model.rotary_base == hf.config.rope_parameters["rope_theta"] == 100000.0
    assert source.model.norm_epsilon == pytest.approx(hf.config.rms_norm_eps)

    source.save_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer.encode("Why is the sky blue?")) == "Why is the sky blue?"
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")
