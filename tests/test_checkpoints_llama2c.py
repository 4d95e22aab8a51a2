"""llama2.c files: weights as transformers computes with them, and a real model's story."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from sentencepiece import SentencePieceProcessor
from transformers import LlamaForCausalLM

from checkpoints_tools.convert import convert
from checkpoints_tools.hf import HfSource
from checkpoints_tools.llama2c import MAGIC, Llama2cSource
from megatron_sps2.engine.tokenizer import load_tokenizer
from tests.sps2_command import sps2
from tests.tiny_llama import save_hf_llama

STORIES = Path(__file__).parents[2] / "shared" / "data" / "stories260K"
HEADS, LAYERS = (8, 2), 2
MATRICES = ("wq", "wk", "wv", "wo")


def interleaved(weight: torch.Tensor, num_heads: int) -> np.ndarray:
    """Rows of q or k as llama2.c turns them: dims i and i + d/2 become 2i and 2i + 1."""
    order = [(pair, half) for pair in range(4) for half in (0, 1)]
    rows = [weight[head * 8 + pair + half * 4] for head in range(num_heads) for pair, half in order]
    return torch.stack(rows).numpy()


def write(path: Path, hf: LlamaForCausalLM, version: int, tied: bool) -> None:
    """Written by hand, from the description of the format."""
    model, layers = hf.model, hf.model.layers
    parts = {
        "wq": [interleaved(each.self_attn.q_proj.weight, HEADS[0]) for each in layers],
        "wk": [interleaved(each.self_attn.k_proj.weight, HEADS[1]) for each in layers],
        "wv": [each.self_attn.v_proj.weight for each in layers],
        "wo": [each.self_attn.o_proj.weight for each in layers],
        "att": [each.input_layernorm.weight for each in layers],
        "ffn": [each.post_attention_layernorm.weight for each in layers],
        "w1": [each.mlp.gate_proj.weight for each in layers],
        "w2": [each.mlp.down_proj.weight for each in layers],
        "w3": [each.mlp.up_proj.weight for each in layers],
        "emb": [model.embed_tokens.weight],
        "norm": [model.norm.weight],
        "out": [] if tied else [hf.lm_head.weight],
        "freqs": [np.zeros((2, 512, 4), np.float32)],
    }
    orders = {
        0: ["emb", "att", *MATRICES, "ffn", "w1", "w2", "w3", "norm", "freqs", "out"],
        1: ["att", "ffn", "norm", "emb", *MATRICES, "w1", "w2", "w3", "out"],
    }
    sizes = (64, 96, LAYERS, *HEADS, 251, 512)
    if version:
        header = struct.pack("<Ii7iB", MAGIC, version, *sizes, tied).ljust(256, b"\0")
    else:
        header = struct.pack("<7i", *sizes[:5], 251 if tied else -251, 512)
    with path.open("wb") as file:
        file.write(header)
        for name in orders[version]:
            for each in parts[name]:
                array = each if isinstance(each, np.ndarray) else each.detach().numpy()
                file.write(np.ascontiguousarray(array, dtype="<f4").tobytes())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("version", [0, 1])
def test_every_weight_is_that_of_the_model_it_was_written_from(
    version: int, tied: bool, tmp_path: Path
) -> None:
    hf = save_hf_llama(tmp_path / "hf", *HEADS, tie_word_embeddings=tied)
    with torch.no_grad():
        write(tmp_path / "model.bin", hf, version, tied)
    ours, theirs = Llama2cSource(tmp_path / "model.bin"), HfSource(tmp_path / "hf")
    assert ours.shapes.keys() == theirs.shapes.keys()
    for name in theirs.shapes:
        assert torch.equal(ours.fetch(name), theirs.fetch(name)), name
    assert ours.model.tie_embeddings is tied


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    hf = save_hf_llama(tmp_path / "hf", *HEADS)
    with torch.no_grad():
        write(tmp_path / "model.bin", hf, 0, False)
    data = (tmp_path / "model.bin").read_bytes()
    (tmp_path / "cut.bin").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"cut\.bin has \d+ bytes, \d+ expected"):
        convert(tmp_path / "cut.bin", tmp_path / "target")


@pytest.mark.skipif(not STORIES.is_dir(), reason=f"{STORIES} is absent")
def test_a_real_model_tells_its_story(tmp_path: Path) -> None:
    assert sps2("convert", STORIES / "stories260K.bin", tmp_path / "ckpt").returncode == 0
    sentencepiece = SentencePieceProcessor(str(STORIES / "tok512.model"))
    tokenizer = load_tokenizer(tmp_path / "ckpt")
    for text in ("", "Once upon a time", "  two  spaces\n\ttab ", "naïve 日本 🙂"):
        assert tokenizer.encode(text) == [1, *sentencepiece.encode(text)], text
    (tmp_path / "ids.json").write_text("[1]")
    done = sps2(
        *("generate", "--checkpoint", tmp_path / "ckpt", "--sp", 2, "--prompt-ids", tmp_path / "ids.json"),
        *("--max-tokens", 40, "--temperature", 0),
    )
    story = "Once upon a time, there was a little girl named Lily."
    assert done.stdout.strip().startswith(story), done.stdout + done.stderr
