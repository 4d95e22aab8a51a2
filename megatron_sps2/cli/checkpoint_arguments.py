"""The flags of the commands that convert, compare and look at checkpoints."""

from __future__ import annotations

import argparse

from megatron_sps2.cli.arguments import Commands, command, finish
from megatron_sps2.config import CHECKPOINT_FORMATS, DTYPES


def add_convert(commands: Commands, name: str) -> None:
    parser = command(commands, name, "convert GGUF, Hugging Face, Megatron and DeepSpeed checkpoints")
    parser.add_argument("source", metavar="SRC", help="a .gguf file, or a Hugging Face or Megatron folder")
    parser.add_argument("target", metavar="DST", help="the folder to write")
    parser.add_argument(
        "--to", choices=CHECKPOINT_FORMATS, default="megatron", help="what to write (default: %(default)s)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype to store (default: the source's)")
    _add_cut(parser)


def add_reshard(commands: Commands, name: str) -> None:
    parser = command(commands, name, "cut a Megatron checkpoint for other tensor-parallel and pipeline sizes")
    parser.add_argument("source", metavar="SRC", help="a checkpoint of Megatron or Megatron-DeepSpeed")
    parser.add_argument("target", metavar="DST", help="the folder to write, as megatron-legacy")
    _add_cut(parser)


def _add_cut(parser: argparse.ArgumentParser) -> None:
    for flag, what in {"--tp": "tensor-parallel ranks", "--pp": "pipeline stages"}.items():
        help_text = f"{what} that a megatron-legacy checkpoint is cut for; the others load at any"
        parser.add_argument(flag, type=int, default=1, metavar="N", help=help_text)
    _add_trust(parser)
    parser.add_argument("--force", action="store_true", help="replace the checkpoint that is at DST")
    finish(parser)


def add_verify(commands: Commands, name: str) -> None:
    parser = command(commands, name, "compare two checkpoints of any format, weight by weight")
    parser.add_argument("first", metavar="A", help="a .gguf file, or a Hugging Face or Megatron folder")
    parser.add_argument("second", metavar="B", help="another one")
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.0,
        metavar="X",
        help="0: the same bits; else a share of a weight",
    )
    parser.add_argument("--logits", action="store_true", help="run both models and compare what they say")
    _add_trust(parser)
    finish(parser)


def add_inspect(commands: Commands, name: str) -> None:
    parser = command(commands, name, "print what a checkpoint is: format, shape, dtype, shards, sizes")
    parser.add_argument("source", metavar="DIR", help="a .gguf file, or a Hugging Face or Megatron folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, nothing else")
    _add_trust(parser)
    finish(parser)


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust-pickle", action="store_true", help="let a legacy checkpoint run the code that it holds"
    )
