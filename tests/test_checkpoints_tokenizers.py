"""Tokenizer files of older kinds become tokenizer.json, and say the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from tokenizers import normalizers

from checkpoints_tools import tokenizer_files
from checkpoints_tools.tokenizer_files import copy_tokenizer
from megatron_sps2.engine.detokenizer import Detokenizer
from megatron_sps2.engine.tokenizer import load_tokenizer

TEXTS = (
    "",
    "the sequence is spread over ranks",
    "  two  spaces\n\ttab ",
    "naïve 日本 🙂 9,000",
    "each word, and THE end.",
)


def train(folder: Path, **options: Any) -> Path:
    """A small SentencePiece model with byte fallback, of the demo's prompt."""
    like_llama = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    SentencePieceTrainer.train(
        input=str(Path(__file__).parent.parent / "examples" / "prompt.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        max_sentence_length=1 << 20,
        minloglevel=2,
        **{**like_llama, **options},
    )
    return folder


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("sentencepiece"))


def test_a_model_that_normalises_gives_the_same_tokens(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    train(tmp_path, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)
    copy_tokenizer(tmp_path, tmp_path / "target")
    reference, ours = (
        SentencePieceProcessor(str(tmp_path / "tokenizer.model")),
        load_tokenizer(tmp_path / "target"),
    )
    for text in (*TEXTS, "Ａ ﬁ ①"):
        assert ours.encode(text) == [1, *reference.encode(text)], text


def test_a_model_that_would_be_cut_otherwise_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "target").mkdir()
    train(tmp_path, remove_extra_whitespaces=True)
    monkeypatch.setattr(tokenizer_files, "_normalizer", lambda model: normalizers.Prepend("▁"))
    with pytest.raises(ValueError, match=r"tokenizer\.model: tokenizer\.json would not give the tokens"):
        copy_tokenizer(tmp_path, tmp_path / "target")


@pytest.mark.parametrize(
    ("said", "first", "last"),
    [({}, [1], []), ({"add_bos_token": False}, [], []), ({"add_eos_token": True}, [1], [2])],
)
def test_a_sentencepiece_model_gives_the_same_tokens(
    said: dict[str, Any], first: list[int], last: list[int], sentencepiece: Path, tmp_path: Path
) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    (source / "tokenizer.model").write_bytes((sentencepiece / "tokenizer.model").read_bytes())
    if said:
        (source / "tokenizer_config.json").write_text(json.dumps(said))
    copy_tokenizer(source, target)
    reference = SentencePieceProcessor(str(sentencepiece / "tokenizer.model"))
    ours = load_tokenizer(target)
    for text in TEXTS:
        assert ours.encode(text) == [*first, *reference.encode(text), *last], text


def test_a_character_of_several_byte_tokens_is_streamed_whole(sentencepiece: Path, tmp_path: Path) -> None:
    copy_tokenizer(sentencepiece, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    stream = Detokenizer(tokenizer, (), 0)
    text = "naïve 日本 🙂"
    pieces = [stream.push(token) for token in tokenizer.encode(text)]
    assert "".join([*pieces, stream.flush()]).strip() == text
    assert len(pieces) > len(text) and not any("\ufffd" in piece for piece in pieces)


def test_a_vocabulary_and_merges_give_the_tokens_of_gpt2(tmp_path: Path) -> None:
    from tokenizers import ByteLevelBPETokenizer

    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    target.mkdir()
    trained = ByteLevelBPETokenizer()
    trained.train([str(Path(__file__).parent.parent / "examples" / "prompt.txt")], vocab_size=500)
    trained.save_model(str(source))
    copy_tokenizer(source, target)
    ours = load_tokenizer(target)
    for text in TEXTS:
        assert ours.encode(text) == trained.encode(text).ids, text
        assert ours.decode(ours.encode(text)) == text
