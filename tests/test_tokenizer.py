"""Tokenizer: a checkpoint folder's own files, chat template, errors that name what is missing."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from megatron_sps2.engine.tokenizer import Tokenizer, check_ids, load_tokenizer

TEXT = "Hello, world! Grüße, 你好, 😀👩‍👩‍👧.\n  def f(x):\treturn x  # done"
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def save_tokenizer(folder: Path, chat_template: str | None = None) -> Path:
    """A byte-level BPE tokenizer that puts <s> before every text."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    raw.train_from_iterator([TEXT] * 3, trainer)
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend = PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>")
    backend.chat_template = chat_template
    backend.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("chat"), TEMPLATE)


def test_text_comes_back_and_special_tokens_are_added_as_the_folder_says(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode(TEXT)
    assert ids[0] == 0 and all(type(i) is int for i in ids)
    assert tokenizer.decode(ids) == TEXT
    assert (tokenizer.eos_token_ids, tokenizer.special_token_ids) == ((1,), {0, 1})
    assert tokenizer.vocab_size == len(AutoTokenizer.from_pretrained(folder, local_files_only=True))


def test_decoding_does_not_tidy_spaces(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    text = "a , b . do n't"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_loading_touches_no_network(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the tokenizer tried to reach the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert load_tokenizer(folder).encode("hi")


def test_a_chat_is_rendered_with_the_opening_of_the_answer_and_nothing_doubled(chat_folder: Path) -> None:
    tokenizer = load_tokenizer(chat_folder)
    ids = tokenizer.encode_chat(
        [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "hi"}]
    )
    plain = tokenizer.encode("")  # the bare <s>
    pieces = [tokenizer.encode(t)[1:] for t in ("user: Hello", "assistant: hi", "assistant: ")]
    assert ids == plain + pieces[0] + [1] + plain + pieces[1] + [1] + plain + pieces[2]


def test_a_folder_without_chat_template_is_refused_clearly(folder: Path) -> None:
    with pytest.raises(ValueError, match="no chat template"):
        load_tokenizer(folder).encode_chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("messages", "named"),
    [
        ([], "messages is empty"),
        ([{"role": "user"}], r"messages\[0\]\['content'\]"),
        ([{"role": "user", "content": "a"}, {"content": "b"}], r"messages\[1\]\['role'\]"),
        ([{"role": "user", "content": 3}], r"messages\[0\]\['content'\] is 3"),
        ([{"role": "robot", "content": "a"}], "no robots"),
    ],
)
def test_messages_that_cannot_be_rendered_are_refused_by_name(
    chat_folder: Path, messages: list[dict[str, str]], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        load_tokenizer(chat_folder).encode_chat(messages)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os.mkdir(messages[0].content) }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ 1 + messages }}", "unsupported operand"),
    ],
)
def test_a_hostile_chat_template_is_kept_in_its_sandbox(template: str, said: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save_tokenizer(tmp_path, template))
    with pytest.raises(ValueError, match=f"the chat template refuses these messages: .*({said})"):
        tokenizer.encode_chat([{"role": "user", "content": str(tmp_path / "evil")}])
    assert not (tmp_path / "evil").exists()


def test_a_missing_folder_and_a_missing_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", ["", "{}", '{"version": "1.0", "mod'])
def test_a_broken_tokenizer_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="cannot be read"):
        load_tokenizer(tmp_path)


def test_the_config_file_beside_may_be_missing(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode(TEXT) == load_tokenizer(folder).encode(TEXT)
    assert tokenizer.eos_token_ids == ()


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        ([1, 2, 10, 11], "token id 10 at position 2"),
        ([-1], "token id -1 at position 0"),
        ([1, "2"], "token id '2' at position 1"),
        ([1.0], r"token id 1\.0 at position 0"),
        ([True], "token id True at position 0"),
    ],
)
def test_the_first_unknown_id_and_its_position_are_named(ids: list[int], named: str) -> None:
    with pytest.raises(ValueError, match=f"{named} is unknown; use integers from 0 to 9"):
        check_ids(ids, 10)


def test_known_ids_pass() -> None:
    check_ids([], 10)
    check_ids(list(range(10)), 10)


@pytest.fixture(scope="module")
def smollm2(smollm2_checkpoint: Path) -> Tokenizer:
    if not (Path(smollm2_checkpoint) / "tokenizer.json").is_file():
        pytest.skip("no SmolLM2 checkpoint")
    return load_tokenizer(smollm2_checkpoint)


@pytest.mark.model
def test_smollm2_is_read_as_transformers_reads_it(smollm2: Tokenizer, smollm2_checkpoint: Path) -> None:
    reference = PreTrainedTokenizerFast(tokenizer_file=str(Path(smollm2_checkpoint) / "tokenizer.json"))
    assert smollm2.encode(TEXT) == reference(TEXT)["input_ids"]
    assert smollm2.decode(smollm2.encode(TEXT)) == TEXT
    assert (smollm2.vocab_size, smollm2.eos_token_ids) == (49152, (2,))


@pytest.mark.model
def test_the_chat_template_of_smollm2_opens_the_answer(smollm2: Tokenizer) -> None:
    ids = smollm2.encode_chat([{"role": "user", "content": "Hi"}])
    assert ids[0] == 1 and ids.count(1) == 3 and ids.count(2) == 2  # system, user, answer
    assert smollm2.decode(ids).endswith("user\nHi\nassistant\n")
