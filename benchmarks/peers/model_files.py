"""The model that all peers run, in the form that each one loads, and the prompts. Made once per run."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.peers.gguf_file import write_gguf
from benchmarks.side_by_side import VOCAB_SIZE, random_llama
from checkpoints_tools.convert import convert


@contextmanager
def model_files() -> Iterator[dict[str, str]]:
    """Paths by form: one random Llama in bf16, 56M parameters (benchmarks/side_by_side.py)."""
    with TemporaryDirectory(prefix="peers-") as folder:
        hf, megatron, gguf = (Path(folder) / name for name in ("hf", "megatron", "model.gguf"))
        random_llama().to(torch.bfloat16).save_pretrained(hf)  # type: ignore[arg-type]
        convert(hf, megatron)
        write_gguf(hf, gguf)
        yield {"hf": str(hf), "megatron": str(megatron), "gguf": str(gguf)}


def prompt(num_tokens: int, seed: int) -> list[int]:
    source = random.Random(f"{num_tokens} {seed}")
    return [source.randrange(VOCAB_SIZE) for _ in range(num_tokens)]
