"""A model's tokenizer files -> those of a checkpoint: tokenizer.json, made where only older files are there.

Knows file names; SentencePiece models and GPT-2's vocabularies are read by transformers.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

FAST = "tokenizer.json"
SENTENCEPIECE = "tokenizer.model"
CONFIG = "tokenizer_config.json"
BPE = ("vocab.json", "merges.txt")
MORE = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
FILES = (FAST, CONFIG, SENTENCEPIECE, *BPE, *MORE)
# Spaces of all kinds, capitals, digits, marks, wide and rare characters, half and full width.
PROBES = (
    *("The end.", " a  b   c ", "tab\tline\n\nend\r\n", "1234.5e-6"),
    *("Ünïcödé №5 ﬁ \uff21", "日本語 🙂 \u200b"),
)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Whatever there is of it, and tokenizer.json in any case; a warning where there is no tokenizer."""
    for name in FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if (folder / FAST).is_file():
        return
    if (folder / SENTENCEPIECE).is_file():
        said = json.loads((folder / CONFIG).read_text()) if (folder / CONFIG).is_file() else {}
        save_sentencepiece(folder / SENTENCEPIECE, folder, said)
    elif all((folder / name).is_file() for name in BPE):
        _save_bpe(folder)
    else:
        logger.warning("%s has no tokenizer; the checkpoint will take token ids only", source)


def save_sentencepiece(model: Path, folder: Path, said: dict[str, Any]) -> None:
    """tokenizer.json of a SentencePiece model, as Llama's; `said`: its tokenizer_config.json.

    `add_bos_token` and `add_eos_token` become part of it; by default a text begins with BOS.
    """
    from tokenizers import processors
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as alone:
        shutil.copyfile(model, Path(alone) / SENTENCEPIECE)
        (Path(alone) / CONFIG).write_text(json.dumps({**said, "tokenizer_class": "LlamaTokenizer"}))
        tokenizer = AutoTokenizer.from_pretrained(alone)
    first = [tokenizer.bos_token] if said.get("add_bos_token", True) else []
    last = [tokenizer.eos_token] if said.get("add_eos_token", False) else []
    backend = tokenizer.backend_tokenizer
    backend.normalizer, backend.pre_tokenizer = _normalizer(model), None
    backend.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last],
        special_tokens=[(token, tokenizer.convert_tokens_to_ids(token)) for token in (*first, *last)],
    )
    _check_same(model, backend)
    tokenizer.save_pretrained(folder)


def _normalizer(model: Path) -> Any:
    """What SentencePiece does to a text before it cuts it; transformers' own is only like it."""
    from sentencepiece.sentencepiece_model_pb2 import ModelProto  # type: ignore[attr-defined]
    from tokenizers import Regex, normalizers

    read = ModelProto()
    read.ParseFromString(model.read_bytes())
    said, steps = read.normalizer_spec, list[Any]()
    if said.precompiled_charsmap:
        steps.append(normalizers.Precompiled(said.precompiled_charsmap))
    if said.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(r"\A | \z"), "")]
    if said.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])


def _check_same(model: Path, backend: Any) -> None:
    """Raises ValueError where SentencePiece itself cuts a text otherwise, e.g. after normalising it."""
    from sentencepiece import SentencePieceProcessor

    reference = SentencePieceProcessor(str(model))
    for text in PROBES:
        if backend.encode(text, add_special_tokens=False).ids != reference.encode(text):
            raise ValueError(
                f"{model}: tokenizer.json would not give the tokens of SentencePiece for {text!r}; put a "
                "tokenizer.json beside it that does"
            )


def _save_bpe(folder: Path) -> None:
    from transformers import GPT2Tokenizer

    GPT2Tokenizer.from_pretrained(folder).save_pretrained(folder)
