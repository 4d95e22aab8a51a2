"""The flags of every command and the settings they make. Names are those of Megatron and vLLM users.

A TOML file given with --config sets defaults by flag name; flags on the command line win.
"""

from __future__ import annotations

import argparse
import tomllib
from pathlib import Path
from typing import Any

from megatron_sps2.config import DTYPES, PREFILL_STRATEGIES, AttentionConfig, ParallelConfig, SamplingParams

Commands = Any  # argparse does not export the type of add_subparsers()


def add_generate(commands: Commands, name: str) -> None:
    parser = _command(commands, name, "answer one prompt and print the text, a report or JSON")
    _add_engine(parser)
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt itself")
    prompt.add_argument(
        "--prompt-file", metavar="FILE", help="a text file (UTF-8) with the prompt; - is stdin"
    )
    prompt.add_argument("--prompt-ids", metavar="FILE", help="a JSON file with a list of token ids")
    parser.add_argument("--chat", action="store_true", help="wrap the prompt in the model's chat template")
    _add_sampling(parser, max_tokens=64)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--report", action="store_true", help="end with a table of times, KV and bytes sent")


def add_chat(commands: Commands, name: str) -> None:
    parser = _command(commands, name, "talk with the model; the KV cache is kept between turns")
    _add_engine(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message")
    _add_sampling(parser, max_tokens=256)


def add_convert(commands: Commands, name: str) -> None:
    parser = _command(commands, name, "convert a GGUF file or Hugging Face folder to a Megatron checkpoint")
    parser.add_argument(
        "source", metavar="SRC", help="a .gguf file, or a folder with config.json and *.safetensors"
    )
    parser.add_argument("target", metavar="DST", help="the checkpoint folder to write")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype to store (default: the source's)")
    parser.add_argument("--force", action="store_true", help="replace DST if it exists")
    _finish(parser)


def add_doctor(commands: Commands, name: str) -> None:
    parser = _command(commands, name, "print what is installed, the ranks, and the memory a checkpoint needs")
    parser.add_argument("--checkpoint", metavar="DIR")
    _add_parallel(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--max-model-len", type=int, metavar="N", help="tokens of one request")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    _finish(parser)


def parallel_config(args: argparse.Namespace) -> ParallelConfig:
    return ParallelConfig(sp_size=args.sp, tp_size=args.tp)


def attention_config(args: argparse.Namespace) -> AttentionConfig:
    return AttentionConfig(strategy=args.strategy, pipeline=args.pipeline)


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    return SamplingParams(
        max_tokens=args.max_tokens,
        min_tokens=args.min_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
        seed=args.seed,
        stop=tuple(args.stop),
        stop_token_ids=tuple(args.stop_token_ids),
        ignore_eos=args.ignore_eos,
        logprobs=args.logprobs,
    )


def _command(commands: Commands, name: str, what: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=what, description=what)
    return parser


def _add_parallel(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        *("--sp", "--sequence-parallel-size", "--context-parallel-size"),
        type=int,
        default=1,
        metavar="P",
        help="sequence-parallel ranks",
    )
    parser.add_argument(
        *("--tp", "--tensor-model-parallel-size", "--tensor-parallel-size"),
        type=int,
        default=1,
        metavar="T",
        help="tensor-parallel ranks",
    )


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", "--load", required=True, metavar="DIR", help="a folder made by `sps2 convert`"
    )
    _add_parallel(parser)
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="dtype of weights, KV and computing"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda where there is one"
    )
    parser.add_argument(
        "--attention", choices=("exact",), default="exact", help="exact attention over all tokens"
    )
    parser.add_argument(
        "--strategy", choices=PREFILL_STRATEGIES, default="auto", help="how a prompt attends across sp ranks"
    )
    parser.add_argument(
        "--pipeline",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="overlap the exchange of a head chunk with the attention of another; never changes the result",
    )
    parser.add_argument(
        *("--max-model-len", "--inference-max-seq-length"),
        type=int,
        metavar="N",
        help="tokens of prompt and answer at most (default: what this run needs)",
    )
    parser.add_argument("--block-size", type=int, default=64, metavar="N", help="tokens per KV cache block")
    parser.add_argument(
        "--timeout-s",
        type=float,
        default=300,
        metavar="S",
        help="a collective that takes longer ends the run; a rank that dies is noticed at once",
    )
    _finish(parser)


def _add_sampling(parser: argparse.ArgumentParser, max_tokens: int) -> None:
    parser.add_argument("--max-tokens", "--tokens-to-generate", type=int, default=max_tokens, metavar="N")
    parser.add_argument("--min-tokens", type=int, default=0, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=0, metavar="N", help="0 keeps all")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="X")
    parser.add_argument("--min-p", type=float, default=0.0, metavar="X")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="end before this text; repeatable"
    )
    parser.add_argument("--stop-token-ids", type=int, nargs="*", default=[], metavar="ID")
    parser.add_argument("--ignore-eos", action="store_true")
    parser.add_argument(
        "--logprobs", type=int, metavar="K", help="log-probability of each token and the K likeliest"
    )


def _finish(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config", action=_TomlDefaults, metavar="FILE", help="TOML file with defaults for these flags"
    )
    parser.add_argument("--log-level", choices=("debug", "info", "warning", "error"), default="warning")


class _TomlDefaults(argparse.Action):
    """--config FILE: each key is a flag's name without dashes in front; flags on the command line win."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any
    ) -> None:
        try:
            settings = tomllib.loads(Path(values).read_text())
        except (OSError, ValueError) as error:
            parser.error(f"--config {values}: {error}")
        for key, value in settings.items():
            name = key.replace("-", "_")
            actions = {action.dest: action for action in parser._actions}
            if name not in actions:
                parser.error(f"--config {values}: {key} is not a flag of this command")
            # A flag given before --config has already left its default; it wins.
            if getattr(namespace, name, None) == parser.get_default(name):
                setattr(namespace, name, value)
