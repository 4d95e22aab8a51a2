"""Detokenizer: whole characters only, stop strings across and inside tokens, constant cost."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer
from transformers import PreTrainedTokenizerFast

from megatron_sps2.engine.detokenizer import Detokenizer
from megatron_sps2.engine.tokenizer import Tokenizer, load_tokenizer

TEXT = "Hello, world!  Grüße aus Köln, 你好世界, 😀😀👩‍👩‍👧🇩🇪.\n  def f(x):\treturn x  # done\n\nعربي e\u0301"
BYTE = "\ufffd"


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    """BPE over bytes with few merges: an emoji is four tokens."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(["Hello world, def return done, the end of the world"] * 3, trainer)
    raw.add_tokens([AddedToken("<tool>", normalized=False)])
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>"))


@pytest.fixture(scope="module")
def byte_fallback() -> Tokenizer:
    """As SentencePiece models have it: a mark for a space, unknown characters as byte tokens."""
    words = ["<s>", "</s>", "<unk>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "▁Hello", "▁world", "!", "a"]
    vocab = {word: i for i, word in enumerate(words)}
    raw = RawTokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    backend = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    return Tokenizer(backend)


def stream(
    tokenizer: Tokenizer, ids: Sequence[int], stop: tuple[str, ...] = (), min_tokens: int = 0
) -> tuple[list[str], Detokenizer]:
    """Every piece of text that a client would see, flush included."""
    detokenizer = Detokenizer(tokenizer, stop, min_tokens)
    pieces = [detokenizer.push(token_id) for token_id in ids]
    return [*pieces, detokenizer.flush()], detokenizer


def as_bytes(tokenizer: Tokenizer, text: str) -> list[int]:
    """Byte-fallback tokens of `text`."""
    return [3 + byte for byte in text.encode()]


def test_joined_pieces_are_the_text(byte_level: Tokenizer) -> None:
    ids = byte_level.encode(TEXT)
    assert "".join(stream(byte_level, ids)[0]) == byte_level.decode(ids) == TEXT


def test_no_piece_holds_half_a_character(byte_level: Tokenizer) -> None:
    ids = byte_level.encode(TEXT)
    assert BYTE in "".join(byte_level.decode([i]) for i in ids)  # the control: token by token it would
    assert not any(BYTE in piece for piece in stream(byte_level, ids)[0])


def test_an_emoji_appears_with_its_last_byte(byte_level: Tokenizer) -> None:
    pieces, _ = stream(byte_level, byte_level.encode("a😀b"))
    assert pieces == ["a", "", "", "", "😀", "b", ""]


def test_text_before_half_a_character_is_shown_at_once(byte_fallback: Tokenizer) -> None:
    ids = [260, 262, *as_bytes(byte_fallback, "😀😀"), 261, 259, 263]
    pieces, _ = stream(byte_fallback, ids)
    assert pieces == ["Hello", "!", "", "", "", "😀", "", "", "", "😀", " world", " ", "a", ""]
    assert "".join(pieces) == byte_fallback.decode(ids)


def test_a_space_at_the_start_is_stripped_only_there(byte_fallback: Tokenizer) -> None:
    unknown = 9999  # an id of a padded vocabulary: it has no text
    cases = ([259, 260, 261], [260, 259, 259, 261], [0, 259, 259, 263], [263, 1, 260], [260, unknown, 261])
    for ids in (*cases, [260, *[0] * 50, 261]):
        assert "".join(stream(byte_fallback, ids)[0]) == byte_fallback.decode(ids)


@pytest.mark.parametrize("seed", range(30))
def test_random_ids_stream_to_what_decode_gives(byte_level: Tokenizer, seed: int) -> None:
    """Mostly invalid bytes, special and added tokens among them."""
    rng = random.Random(seed)
    ids = rng.choices(range(byte_level.vocab_size), k=300)
    assert "".join(stream(byte_level, ids)[0]) == byte_level.decode(ids)


@pytest.mark.parametrize("tail", [[], [0xF0, 0x9F], [0xF0, 0x9F, 0x98, 0x80], [0x41]])
@pytest.mark.parametrize("byte", [0x80, 0xE4, 0xF0])
def test_a_long_run_of_garbage_streams_on_and_ends_right(
    byte_level: Tokenizer, byte: int, tail: list[int]
) -> None:
    letters = {b: byte_level._backend.convert_tokens_to_ids(c) for b, c in byte_letters().items()}
    for num in range(60, 90):  # wherever the window ends, inside a character too
        ids = [letters[b] for b in [*[byte] * num, *tail]]
        pieces, _ = stream(byte_level, ids)
        assert "".join(pieces) == byte_level.decode(ids)
        assert len("".join(pieces[:50])) > 10  # not all held until the end


def byte_letters() -> dict[int, str]:
    """Byte -> the letter that stands for it in a byte-level vocabulary (GPT-2's table)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def test_unfinished_bytes_come_out_when_the_answer_ends(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("ok 😀")[:-1]
    pieces, _ = stream(byte_level, ids)
    assert "".join(pieces) == byte_level.decode(ids) == "ok " + BYTE
    assert pieces[-1] == BYTE


def test_special_tokens_show_nothing(byte_level: Tokenizer) -> None:
    ids = [0, *byte_level.encode("Hello"), 1, *byte_level.encode(" <tool>w"), 1]
    assert "".join(stream(byte_level, ids)[0]) == "Hello <tool>w"


@pytest.mark.parametrize("fixture", ["byte_level", "byte_fallback"])
def test_a_stop_string_over_several_tokens_ends_the_text_before_it(
    fixture: str, request: pytest.FixtureRequest
) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(fixture)
    text = "a! a!!a world"
    ids = tokenizer.encode(text) if fixture == "byte_level" else as_bytes(tokenizer, text)
    pieces, detokenizer = stream(tokenizer, ids, stop=("!!a", "zzz"))
    assert "".join(pieces) == "a! a"
    assert detokenizer.finished and detokenizer.stopped_by == "!!a"


def test_a_stop_string_inside_one_token_ends_the_text_inside_it(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("the world")
    assert any("orl" in byte_level.decode([i]) for i in ids)
    pieces, detokenizer = stream(byte_level, ids, stop=("orl",))
    assert "".join(pieces) == "the w" and detokenizer.stopped_by == "orl"


def test_a_stop_string_with_an_emoji_is_met(byte_level: Tokenizer) -> None:
    assert "".join(stream(byte_level, byte_level.encode("go 😀 on"), stop=("😀 o",))[0]) == "go "


def test_what_may_begin_a_stop_string_is_held_and_given_out_when_it_does_not(byte_level: Tokenizer) -> None:
    pieces, detokenizer = stream(byte_level, byte_level.encode("x##?##"), stop=("###",))
    assert pieces == ["x", "", "", "##?", "", "", "##"]
    assert not detokenizer.finished and detokenizer.stopped_by is None


def test_tokens_after_the_stop_are_ignored(byte_level: Tokenizer) -> None:
    pieces, detokenizer = stream(byte_level, byte_level.encode("a#b#c#d"), stop=("#",))
    assert "".join(pieces) == "a" and detokenizer.push(40) == "" and detokenizer.flush() == ""


def test_the_stop_that_is_complete_first_wins_however_text_is_cut(byte_fallback: Tokenizer) -> None:
    class Cut:
        """A tokenizer whose token i is the i-th piece of a text."""

        special_token_ids: frozenset[int] = frozenset()

        def __init__(self, pieces: list[str]) -> None:
            self.pieces = pieces

        def decode(self, ids: Sequence[int]) -> str:
            return "".join(self.pieces[i] for i in ids)

    rng, text, stop = random.Random(0), "xxabcdyyaabbc", ("abcde", "bcd", "cd", "aab")
    for _ in range(100):
        cuts = sorted({0, len(text), *rng.sample(range(len(text)), 5)})
        pieces = [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        detokenizer = Detokenizer(Cut(pieces), stop)
        shown = "".join(detokenizer.push(i) for i in range(len(pieces))) + detokenizer.flush()
        assert (shown, detokenizer.stopped_by) == ("xxa", "bcd")


def test_stop_strings_wait_for_min_tokens(byte_level: Tokenizer) -> None:
    ids = byte_level.encode("##a##b")
    assert len(ids) == 6
    assert "".join(stream(byte_level, ids, stop=("##",))[0]) == ""
    assert "".join(stream(byte_level, ids, stop=("##",), min_tokens=1)[0]) == "##a"
    assert "".join(stream(byte_level, ids, stop=("##",), min_tokens=6)[0]) == "##a##b"


def test_a_token_costs_the_same_late_as_early(byte_level: Tokenizer) -> None:
    class Counting:
        special_token_ids = byte_level.special_token_ids
        num_decoded = 0

        def decode(self, ids: Sequence[int]) -> str:
            self.num_decoded += len(ids)
            return byte_level.decode(ids)

    rng, counting = random.Random(1), Counting()
    for ids in (
        byte_level.encode(TEXT * 20),
        [260] * 2000,
        rng.choices(range(byte_level.vocab_size), k=2000),
    ):
        counting.num_decoded = 0
        detokenizer = Detokenizer(counting, stop=("never met",))
        for token_id in ids:
            detokenizer.push(token_id)
        assert counting.num_decoded < 40 * len(ids)  # a growing window would take 1000 a token


@pytest.mark.model
def test_smollm2_streams_every_script(smollm2_checkpoint: Path) -> None:
    if not (Path(smollm2_checkpoint) / "tokenizer.json").is_file():
        pytest.skip("no SmolLM2 checkpoint")
    tokenizer = load_tokenizer(smollm2_checkpoint)
    ids = tokenizer.encode(TEXT)
    pieces, _ = stream(tokenizer, ids)
    assert "".join(pieces) == TEXT and not any(BYTE in piece for piece in pieces)
    assert "".join(stream(tokenizer, ids, stop=("世界, 😀",))[0]) == TEXT[: TEXT.index("世界")]
    for seed in range(5):
        ids = random.Random(seed).choices(range(tokenizer.vocab_size), k=500)
        assert "".join(stream(tokenizer, ids)[0]) == tokenizer.decode(ids)
