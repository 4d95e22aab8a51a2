"""A SentencePiece model becomes tokenizer.json, as transformers' Llama tokenizer reads it.

Knows file names; the conversion is transformers'.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from pathlib import Path

logger = logging.getLogger(__name__)


def save_sentencepiece(source: Path, folder: Path) -> None:
    """From the one *.model file in `source`; a warning where there is none, or more than one."""
    found = sorted(source.glob("*.model"))
    if len(found) != 1:
        logger.warning("%s has %d *.model files; the checkpoint will take token ids only", source, len(found))
        return
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as alone:
        shutil.copyfile(found[0], Path(alone) / "tokenizer.model")
        config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
        (Path(alone) / "tokenizer_config.json").write_text(json.dumps(config))
        AutoTokenizer.from_pretrained(alone).save_pretrained(folder)
    shutil.copyfile(found[0], folder / "tokenizer.model")
