"""The tokenizer of a GGUF file -> tokenizer.json, its config and chat template.

Where none can be made that is a warning: weights and token ids go without. Knows keys, not tensors.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

from checkpoints_tools.gguf_metadata import Metadata
from checkpoints_tools.tokenizer_files import SENTENCEPIECE, save_sentencepiece

logger = logging.getLogger(__name__)

_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6  # tokenizer.ggml.token_type, as in SentencePiece
_SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
# Of tokenizer.ggml.pre: words that are tokens stay whole, and a text begins with BOS unless the file says no.
_LIKE_LLAMA3 = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken")


def save_gguf_tokenizer(metadata: Metadata, folder: Path) -> None:
    """A warning where there is no tokenizer, or none that can be read."""
    kind = metadata.of_file("tokenizer.ggml.model")
    makers = {"llama": _save_sentencepiece, "gpt2": _save_byte_level}
    if kind is None:
        logger.warning("%s has no tokenizer; the checkpoint will take token ids only", metadata.path)
        return
    try:
        if kind not in makers:
            raise ValueError(f"tokenizer.ggml.model={kind!r} is neither of {', '.join(makers)}")
        makers[kind](metadata, folder)
    except Exception as error:  # tokenizers and SentencePiece raise nothing narrower
        logger.warning(
            "%s has no tokenizer that can be read (%s); the checkpoint will take token ids only",
            metadata.path,
            error,
        )


def _required(metadata: Metadata, name: str) -> list[Any]:
    found = metadata.of_file(f"tokenizer.ggml.{name}")
    if found is None:
        raise ValueError(f"there is no tokenizer.ggml.{name}")
    return list(found)


def _special_tokens(metadata: Metadata) -> dict[str, str]:
    """Those that have a part to play, by transformers' names."""
    tokens = _required(metadata, "tokens")
    ids = {ours: metadata.of_file(f"tokenizer.ggml.{name}_token_id") for ours, name in _SPECIAL.items()}
    return {ours: tokens[index] for ours, index in ids.items() if index is not None}


def _save_sentencepiece(metadata: Metadata, folder: Path) -> None:
    """GGUF keeps SentencePiece's pieces with their scores and types: the model is made of them again."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]

    columns = [_required(metadata, name) for name in ("tokens", "scores", "token_type")]
    made = ModelProto()
    for token, score, kind in zip(*columns, strict=True):
        made.pieces.add(piece=token, score=score, type=kind)
    made.trainer_spec.model_type = made.trainer_spec.BPE
    made.trainer_spec.byte_fallback = _BYTE in columns[2]
    said: dict[str, Any] = {**_special_tokens(metadata)}
    for ours, default in {"add_bos_token": True, "add_eos_token": False}.items():
        said[ours] = metadata.of_file(f"tokenizer.ggml.{ours}", default)
    spec = made.normalizer_spec
    spec.add_dummy_prefix = metadata.of_file("tokenizer.ggml.add_space_prefix", True)
    spec.remove_extra_whitespaces = metadata.of_file("tokenizer.ggml.remove_extra_whitespaces", False)
    if template := metadata.of_file("tokenizer.chat_template"):
        said["chat_template"] = template
    with tempfile.TemporaryDirectory() as alone:
        model = Path(alone) / SENTENCEPIECE
        model.write_bytes(made.SerializeToString())
        save_sentencepiece(model, folder, said)


def _save_byte_level(metadata: Metadata, folder: Path) -> None:
    """BPE over bytes, as GPT-2's."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    tokens, before = _required(metadata, "tokens"), metadata.of_file("tokenizer.ggml.pre")
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(pair.split(" ")) for pair in _required(metadata, "merges")]
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=before in _LIKE_LLAMA3))
    _set_cuts(metadata, backend, before)
    backend.decoder = decoders.ByteLevel()
    types = zip(tokens, metadata.of_file("tokenizer.ggml.token_type", ()), strict=False)
    backend.add_tokens(
        [
            AddedToken(token, normalized=False, special=kind == _CONTROL)
            for token, kind in types
            if kind in (_CONTROL, _USER_DEFINED)
        ]
    )
    special = _special_tokens(metadata)
    _set_ends(metadata, backend, special, begins=before in _LIKE_LLAMA3)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    tokenizer.chat_template = metadata.of_file("tokenizer.chat_template")
    tokenizer.save_pretrained(folder)


def _set_ends(metadata: Metadata, backend: Any, special: dict[str, str], begins: bool) -> None:
    """BOS before every text and EOS after it, where the file says so; `begins`: BOS, where it is silent."""
    from tokenizers import processors

    first, last = (
        [special[name]] if metadata.of_file(f"tokenizer.ggml.add_{name}", default) and name in special else []
        for name, default in {"bos_token": begins, "eos_token": False}.items()
    )
    backend.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        special_tokens=[(token, backend.token_to_id(token)) for token in (*first, *last)],
    )


def _set_cuts(metadata: Metadata, backend: Any, before: str | None) -> None:
    """How a text is cut into words before it is merged."""
    from tokenizers import Regex, normalizers, pre_tokenizers
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

    if before in GGUF_PRE_TOKENIZER_SPLITS:
        cut = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[before]), behavior="isolated")
        spell = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([cut, spell])
        if before == "qwen2":
            backend.normalizer = normalizers.NFC()
        return
    like_gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = like_gpt2
    if before == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, like_gpt2])
    elif before != "gpt-2":
        logger.warning(
            "%s: tokenizer.ggml.pre=%r is not known; texts are cut into words as for GPT-2, which may not be "
            "how the model was trained",
            metadata.path,
            before,
        )
