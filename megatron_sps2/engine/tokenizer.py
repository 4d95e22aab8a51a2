"""Text to token ids and back, from the tokenizer files of a checkpoint folder; never from the network.

Knows nothing of models, requests or streaming (detokenizer.py streams).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # transformers takes seconds to import
    from transformers import PreTrainedTokenizerFast

TOKENIZER_FILE = "tokenizer.json"
Message = Mapping[str, str]


class Tokenizer:
    """A fast tokenizer with the few operations that generation needs."""

    def __init__(self, backend: PreTrainedTokenizerFast) -> None:
        self._backend = backend
        # The first text switches off what a file may switch on, such as truncation. From then on encoding
        # changes nothing, and threads may share it.
        self.encode("")
        self.vocab_size: int = len(backend)
        self.eos_token_ids: tuple[int, ...] = () if backend.eos_token_id is None else (backend.eos_token_id,)
        self.bos_token_id: int | None = backend.bos_token_id
        added = backend.added_tokens_decoder
        self.special_token_ids = frozenset(token_id for token_id, token in added.items() if token.special)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with the special tokens that this tokenizer adds by itself."""
        # verbose=False: the engine, not the tokenizer, decides what is too long.
        return list(self._backend(text, verbose=False)["input_ids"])

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation and the opening of its answer; ValueError if it cannot be rendered."""
        self._check_chat(messages)
        try:
            ids = self._backend.apply_chat_template(
                [dict(message) for message in messages],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=False,
                tokenizer_kwargs={"verbose": False},
            )
        except Exception as error:  # A template is a program, in jinja's sandbox: it can raise anything.
            raise ValueError(f"the chat template refuses these messages: {error}") from error
        return list(ids)

    def _check_chat(self, messages: Sequence[Message]) -> None:
        if not self._backend.chat_template:
            raise ValueError(
                "the checkpoint has no chat template; send a plain prompt, or put chat_template.jinja beside "
                f"{TOKENIZER_FILE}"
            )
        if not messages:
            raise ValueError("messages is empty; a chat needs at least one message")
        for position, message in enumerate(messages):
            for key in ("role", "content"):
                if not isinstance(message.get(key), str):
                    raise ValueError(
                        f"messages[{position}][{key!r}] is {message.get(key)!r}; every message needs a role "
                        "and a content, both text"
                    )

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids` without special tokens."""
        # Cleaning up spaces would rewrite text that was already streamed.
        text = self._backend.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer in `folder`. Raises FileNotFoundError naming what is missing, ValueError if broken."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"checkpoint folder {folder} does not exist; make one with `sps2 convert`")
    if not (folder / TOKENIZER_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {TOKENIZER_FILE}; convert the checkpoint again, or copy the model's "
            f"{TOKENIZER_FILE} and tokenizer_config.json there"
        )
    from transformers import PreTrainedTokenizerFast

    # Not AutoTokenizer: it may rebuild the tokenizer from a class name; this one takes the file as it is.
    try:
        backend = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the Rust parser raises a bare Exception
        raise ValueError(f"{folder} holds a tokenizer that cannot be read: {error}") from error
    return Tokenizer(backend)


def check_ids(ids: Sequence[int], vocab_size: int) -> None:
    """Raises ValueError naming the first id that is no token of a vocabulary of `vocab_size`."""
    for position, token_id in enumerate(ids):
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise ValueError(
                f"token id {token_id!r} at position {position} is unknown; "
                f"use integers from 0 to {vocab_size - 1}"
            )
