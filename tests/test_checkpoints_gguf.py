"""Converting GGUF: a small file written here, and the real SmolLM2 against transformers' own reader."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from torch import Tensor

from checkpoints_tools.gguf import GgufSource, rows_to_hf
from checkpoints_tools.source import check_weights
from megatron_sps2.config import ModelConfig
from megatron_sps2.model.weights import hf_shapes

MODEL = ModelConfig(
    num_layers=1,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=8,
    vocab_size=40,
    max_seq_len=128,
    norm_epsilon=1e-5,
    rotary_base=20000.0,
    bos_token_id=1,
    eos_token_ids=(2,),
)
GGUF_NAMES = {
    **{"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"},
    **{"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"},
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    **{"self_attn.o_proj": "attn_output"},
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
}


def _interleave(weight: Tensor, num_heads: int) -> Tensor:
    """llama.cpp's order, told per row: half-dim i of a head becomes dims 2i and 2i+1."""
    half = weight.shape[0] // num_heads // 2
    rows = [
        head * 2 * half + i + side * half for head in range(num_heads) for i in range(half) for side in (0, 1)
    ]
    return weight[rows]


def _gguf_name(name: str) -> str:
    parts = name.removesuffix(".weight").split(".")
    if parts[:2] == ["model", "layers"]:
        return f"blk.{parts[2]}.{GGUF_NAMES['.'.join(parts[3:])]}.weight"
    return f"{GGUF_NAMES['.'.join(parts)]}.weight"


def _write(
    path: Path,
    weights: dict[str, Tensor],
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    more: Callable[[GGUFWriter], None] = lambda writer: None,
    architecture: str = "llama",
) -> Path:
    writer = GGUFWriter(path, architecture)
    writer.add_block_count(MODEL.num_layers)
    writer.add_context_length(MODEL.max_seq_len)
    writer.add_embedding_length(MODEL.hidden_size)
    writer.add_feed_forward_length(MODEL.ffn_hidden_size)
    writer.add_head_count(MODEL.num_attention_heads)
    writer.add_head_count_kv(MODEL.num_query_groups)
    writer.add_layer_norm_rms_eps(MODEL.norm_epsilon)
    writer.add_rope_freq_base(MODEL.rotary_base)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    more(writer)
    for name, weight in weights.items():
        if "q_proj" in name or "k_proj" in name:
            heads = MODEL.num_attention_heads if "q_proj" in name else MODEL.num_query_groups
            weight = _interleave(weight, heads)
        used = kind if weight.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(_gguf_name(name), quantize(weight.numpy(), used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn(shape) for name, shape in hf_shapes(MODEL).items()}


def test_a_written_file_comes_back_with_its_shape_and_weights(
    weights: dict[str, Tensor], tmp_path: Path
) -> None:
    source = GgufSource(_write(tmp_path / "tiny.gguf", weights))
    assert source.model == MODEL
    check_weights(source)
    assert all(torch.equal(source.fetch(name), weight) for name, weight in weights.items())


def test_quantised_weights_come_back_within_their_step(weights: dict[str, Tensor], tmp_path: Path) -> None:
    source = GgufSource(_write(tmp_path / "tiny.gguf", weights, GGMLQuantizationType.Q8_0))
    for name, weight in weights.items():
        # Q8_0: 127 steps up to the largest of 32 neighbours, its scale in fp16; half a step off at most.
        torch.testing.assert_close(source.fetch(name), weight, atol=float(weight.abs().max()) / 200, rtol=0)


def test_control_rows_left_in_llama_cpp_order_are_other_rows(weights: dict[str, Tensor]) -> None:
    q = weights["model.layers.0.self_attn.q_proj.weight"]
    assert not torch.equal(_interleave(q, 4), q)
    assert torch.equal(rows_to_hf(_interleave(q, 4), 4), q)


def test_a_file_without_output_weight_is_a_tied_model(weights: dict[str, Tensor], tmp_path: Path) -> None:
    del weights["lm_head.weight"]
    source = GgufSource(_write(tmp_path / "tiny.gguf", weights))
    assert source.model.tie_embeddings
    check_weights(source)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (lambda w: w.add_expert_count(8), "mixtures of experts are not supported"),
        (lambda w: w.add_string("llama.rope.scaling.type", "yarn"), "scaling.type='yarn'"),
        (lambda w: w.add_tensor("rope_freqs.weight", np.ones(4, np.float32)), "scaled positions"),
        (lambda w: w.add_rope_dimension_count(4), "dimension_count=4 is not supported"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    weights: dict[str, Tensor], tmp_path: Path, more: Callable[[GGUFWriter], None], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        GgufSource(_write(tmp_path / "tiny.gguf", weights, more=more))


def test_another_architecture_is_refused_by_name(weights: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="architecture 'qwen2' is not supported"):
        GgufSource(_write(tmp_path / "tiny.gguf", weights, architecture="qwen2"))


def test_missing_and_unexpected_weights_are_named(weights: dict[str, Tensor], tmp_path: Path) -> None:
    del weights["model.layers.0.mlp.up_proj.weight"]
    extra = lambda w: w.add_tensor("blk.0.attn_q.bias", np.ones(32, np.float32))  # noqa: E731
    source = GgufSource(_write(tmp_path / "tiny.gguf", weights, more=extra))
    with pytest.raises(
        ValueError, match=r"up_proj\.weight \(64, 32\) is missing; blk\.0\.attn_q\.bias .*unexpected"
    ):
        check_weights(source)


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.99])
def test_a_truncated_file_is_named(weights: dict[str, Tensor], tmp_path: Path, kept: float) -> None:
    path = _write(tmp_path / "tiny.gguf", weights)
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
    reference = dict(hf.named_parameters())
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
