"""Runs `sps2` as users do, in processes of its own, on a small random model that speaks in numbered words.

Every word is one token, so that an answer, written into a conversation, comes back as the same tokens.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.tiny_llama import VOCAB_SIZE, save_hf_llama

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SPS2 = (sys.executable, "-m", "megatron_sps2")
MAX_SEQ_LEN = 16384
# Processes import torch and Megatron, in seconds; several times that on a busy machine.
TIMEOUT_S = 200
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}w3{% else %}w4{% endif %} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}w4{% endif %}"
)


def make_checkpoint(folder: Path, num_heads: int = 9, num_kv_heads: int = 3, **changes: Any) -> Path:
    """A converted checkpoint of a random model of 6 layers, with a tokenizer of the words w3, w4, ..."""
    from checkpoints_tools.convert import convert

    source = folder / "hf"
    sizes = {"num_hidden_layers": 6, "max_position_embeddings": MAX_SEQ_LEN}
    save_hf_llama(source, num_heads, num_kv_heads, **{**sizes, **changes})
    _save_tokenizer(source)
    convert(source, folder / "checkpoint")
    return folder / "checkpoint"


def _save_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCAB_SIZE))]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend = PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    backend.chat_template = TEMPLATE
    backend.save_pretrained(folder)


def words(ids: Iterable[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def environ(**extra: str) -> dict[str, str]:
    """This process's environment without any launcher's variables, one thread a rank, our Python first."""
    launchers = ("SPS2_", "OMPI_", "PMIX_", "SLURM_", "MASTER_", "TORCHELASTIC_")
    mine = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "PYTHONWARNINGS", "GLOO_SOCKET_IFNAME"}
    kept = {k: v for k, v in os.environ.items() if not k.startswith(launchers) and k not in mine}
    path = f"{BIN}{os.pathsep}{kept['PATH']}"
    return kept | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **extra}


def sps2(*args: object, stdin: str = "", **extra: str) -> subprocess.CompletedProcess[str]:
    """`sps2 ARGS`, run to its end, with `extra` in its environment."""
    command = (*SPS2, *map(str, args))
    return subprocess.run(
        command, input=stdin, capture_output=True, text=True, timeout=TIMEOUT_S, env=environ(**extra)
    )


def answer(*args: object, stdin: str = "", **extra: str) -> dict[str, Any]:
    """What `sps2 generate ARGS --json` prints: one JSON object on stdout, and nothing on stderr."""
    done = sps2("generate", *args, "--json", stdin=stdin, **extra)
    assert (done.returncode, done.stderr) == (0, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def demo_flags(folder: Path) -> tuple[object, ...]:
    """Of `sps2 generate`: the run whose answer every launcher must give."""
    ids = write_ids(folder / "ids.json", range(5, 42))
    ranks = ("--checkpoint", make_checkpoint(folder), "--sp", 2)
    return (*ranks, "--prompt-ids", ids, "--max-tokens", 12, "--temperature", 0)


def write_ids(path: Path, ids: Iterable[int]) -> Path:
    path.write_text(json.dumps(list(ids)))
    return path
