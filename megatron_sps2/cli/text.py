"""Token ids of a text file, by a checkpoint's tokenizer."""

from __future__ import annotations

from pathlib import Path


def check_text(text: str) -> None:
    if not Path(text).is_file():
        raise FileNotFoundError(f"--text {text} is not a file; give a UTF-8 text")


def token_ids(text: str, checkpoint: str) -> list[int]:
    """Raises OSError or ValueError for a file that cannot be read."""
    from megatron_sps2.engine.tokenizer import load_tokenizer

    try:
        content = Path(text).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{text} is not UTF-8 text ({error}); --text takes a plain text file") from error
    return load_tokenizer(checkpoint).encode(content)
