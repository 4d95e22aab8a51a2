"""The tokenizer in a GGUF file becomes tokenizer.json, and says the same; weights go without one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, GGUFWriter
from sentencepiece import SentencePieceProcessor
from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
from tokenizers import ByteLevelBPETokenizer

from checkpoints_tools.convert import convert
from checkpoints_tools.gguf_metadata import ARCHITECTURES, Metadata
from checkpoints_tools.gguf_tokenizer import save_gguf_tokenizer
from megatron_sps2.engine.tokenizer import Tokenizer, load_tokenizer
from tests.families import save_family
from tests.gguf_writer import write_gguf
from tests.test_checkpoints_tokenizers import TEXTS, train

NORMAL, CONTROL = 1, 3  # tokenizer.ggml.token_type


@pytest.fixture(scope="module")
def byte_level() -> ByteLevelBPETokenizer:
    trained = ByteLevelBPETokenizer()
    prompt = Path(__file__).parent.parent / "examples" / "prompt.txt"
    trained.train([str(prompt)], vocab_size=500, special_tokens=["<|unk|>", "<|begin|>", "<|end|>"])
    return trained


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("sentencepiece")) / "tokenizer.model"


def _add_byte_level(writer: GGUFWriter, trained: ByteLevelBPETokenizer, pre: str) -> None:
    vocab = sorted(trained.get_vocab().items(), key=lambda pair: pair[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([token for token, _ in vocab])
    writer.add_token_types([CONTROL if index < 3 else NORMAL for _, index in vocab])
    writer.add_token_merges([" ".join(pair) for pair in _merges(trained)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def _merges(trained: ByteLevelBPETokenizer) -> list[list[str]]:
    return [list(pair) for pair in json.loads(trained._tokenizer.to_str())["model"]["merges"]]


def _add_sentencepiece(writer: GGUFWriter, model: Path) -> None:
    read = ModelProto()
    read.ParseFromString(model.read_bytes())
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.piece for piece in read.pieces])
    writer.add_token_scores([piece.score for piece in read.pieces])
    writer.add_token_types([piece.type for piece in read.pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def _save(folder: Path, add: Callable[[GGUFWriter], Any], architecture: str = "llama") -> Path:
    """A file with nothing but a tokenizer -> the folder it is saved to."""
    path, target = folder / "tiny.gguf", folder / "target"
    writer = GGUFWriter(path, architecture)
    add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    target.mkdir()
    save_gguf_tokenizer(Metadata(path, GGUFReader(path).fields), target)
    return target


def _tokenizer(folder: Path, add: Callable[[GGUFWriter], Any], architecture: str = "llama") -> Tokenizer:
    return load_tokenizer(_save(folder, add, architecture))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_byte_level_tokenizer_of_any_architecture_says_the_same(
    byte_level: ByteLevelBPETokenizer, tmp_path: Path, architecture: str
) -> None:
    ours = _tokenizer(tmp_path, lambda writer: _add_byte_level(writer, byte_level, "gpt-2"), architecture)
    for text in TEXTS:
        assert ours.encode(text) == byte_level.encode(text).ids, text
        assert ours.decode(ours.encode(text)) == text
    assert (ours.bos_token_id, ours.eos_token_ids, ours.special_token_ids) == (1, (2,), {0, 1, 2})
    assert ours.encode("<|end|>") == [2]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sentencepiece_tokenizer_of_any_architecture_says_the_same(
    sentencepiece: Path, tmp_path: Path, architecture: str
) -> None:
    ours = _tokenizer(tmp_path, lambda writer: _add_sentencepiece(writer, sentencepiece), architecture)
    reference = SentencePieceProcessor(str(sentencepiece))
    for text in TEXTS:
        assert ours.encode(text) == [1, *reference.encode(text)], text
    assert (ours.bos_token_id, ours.eos_token_ids) == (1, (2,))


def test_what_the_file_says_of_bos_and_spaces_is_done(sentencepiece: Path, tmp_path: Path) -> None:
    def add(writer: GGUFWriter) -> None:
        _add_sentencepiece(writer, sentencepiece)
        writer.add_add_bos_token(False)
        writer.add_add_eos_token(True)
        writer.add_add_space_prefix(False)
        writer.add_chat_template("{{ messages[0]['content'] }}")

    ours = _tokenizer(tmp_path, add)
    prefixed = SentencePieceProcessor(str(sentencepiece)).encode("word")
    *ids, last = ours.encode(" word")
    assert (ids, last) == (prefixed, 2)
    assert ours.encode("word")[:-1] != prefixed
    assert ours.encode_chat([{"role": "user", "content": " word"}]) == prefixed


def test_llama_3_begins_with_bos_and_keeps_whole_words(
    byte_level: ByteLevelBPETokenizer, tmp_path: Path
) -> None:
    unmerged = byte_level.token_to_id("Ġthe")

    def add(writer: GGUFWriter) -> None:
        _add_byte_level(writer, byte_level, "llama-bpe")
        reachable = [" ".join(pair) for pair in _merges(byte_level) if "".join(pair) != "Ġthe"]
        writer.add_token_merges(reachable)

    assert _tokenizer(tmp_path, add).encode(" the") == [1, unmerged]


def test_smollm_cuts_before_every_digit(byte_level: ByteLevelBPETokenizer, tmp_path: Path) -> None:
    ours = _tokenizer(tmp_path, lambda writer: _add_byte_level(writer, byte_level, "smollm"))
    two_spaces = [byte_level.token_to_id(each) for each in ("a", *byte_level.encode("  ").tokens, "1")]
    assert ours.encode("a  1") == two_spaces


def test_a_way_to_cut_words_that_is_not_known_is_told(
    byte_level: ByteLevelBPETokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _tokenizer(tmp_path, lambda writer: _add_byte_level(writer, byte_level, "deepseek-llm"))
    assert "tokenizer.ggml.pre='deepseek-llm' is not known" in caplog.text


def _broken(writer: GGUFWriter) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["a", "b"])
    writer.add_token_merges(["b c"])


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda w: None, "has no tokenizer; the checkpoint will take token ids only"),
        (lambda w: w.add_tokenizer_model("t5"), "tokenizer.ggml.model='t5' is neither of llama, gpt2"),
        (lambda w: w.add_tokenizer_model("llama"), "has no tokenizer that can be read"),
        (lambda w: w.add_tokenizer_model("gpt2"), "has no tokenizer that can be read"),
        (_broken, "has no tokenizer that can be read"),
    ],
)
def test_a_model_without_a_tokenizer_is_converted_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, add: Callable[[GGUFWriter], Any], message: str
) -> None:
    save_family("qwen3", tmp_path / "hf")
    convert(write_gguf(tmp_path / "tiny.gguf", tmp_path / "hf", change=add), tmp_path / "back", to="hf")
    assert (tmp_path / "back" / "model.safetensors").is_file()
    assert not (tmp_path / "back" / "tokenizer.json").exists()
    assert message in caplog.text
