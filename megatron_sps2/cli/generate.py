"""`sps2 generate`: one prompt in, one answer out, with its times and the bytes it sent."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sps2.cli.arguments import attention_config, check_size_flags, parallel_config, sampling_params
from megatron_sps2.cli.world import in_world
from megatron_sps2.model.manifest import load_model_config

if TYPE_CHECKING:
    from megatron_sps2.engine.build import EngineConfig
    from megatron_sps2.engine.engine import Engine
    from megatron_sps2.engine.tokenizer import Tokenizer

STDIN = "-"


def run(args: argparse.Namespace) -> int:
    return in_world(args, _generate, check_flags)


def check_flags(args: argparse.Namespace) -> None:
    """Raises ValueError or OSError for everything that can be wrong before a prompt is read."""
    check_size_flags(args, load_model_config(args.checkpoint))
    sampling_params(args)
    attention_config(args)
    if not 0 < args.timeout_s < float("inf"):
        raise ValueError(f"--timeout-s {args.timeout_s} must be a number of seconds above 0")


def engine_config(args: argparse.Namespace, max_model_len: int) -> EngineConfig:
    from megatron_sps2.engine.build import EngineConfig

    return EngineConfig(
        checkpoint=args.checkpoint,
        parallel=parallel_config(args),
        attention=attention_config(args),
        dtype=args.dtype,
        max_model_len=max_model_len,
        block_size=args.block_size,
        timeout_s=args.timeout_s,
        # Progress is shown, and Ctrl-C heard, between two layers.
        layers_per_piece=1,
        device="cpu" if args.device == "cpu" else "cuda",
    )


def _generate(args: argparse.Namespace) -> int:
    """On every rank; rank 0 speaks."""
    from megatron_sps2.engine.build import build_engine
    from megatron_sps2.parallel.collectives import from_first_rank

    prompt_ids, longest = from_first_rank(lambda: _measure(args, read_prompt(args)))
    engine = build_engine(engine_config(args, longest))
    if engine.is_leader:
        try:
            return _lead(args, engine, prompt_ids)
        except ValueError:
            engine.stop()  # The prompt was refused; no rank is inside a step.
            engine.gather(None)
            raise
    engine.follow()
    engine.gather(engine.ledger)
    return 0


def _measure(args: argparse.Namespace, prompt_ids: list[int]) -> tuple[list[int], int]:
    """The prompt, and the tokens of prompt and answer that the cache must hold."""
    needed = max(1, len(prompt_ids) + args.max_tokens)
    return prompt_ids, args.max_model_len or min(needed, load_model_config(args.checkpoint).max_seq_len)


def read_prompt(args: argparse.Namespace) -> list[int]:
    """Token ids of the prompt the flags name. Raises ValueError or OSError naming what is wrong with it."""
    if args.prompt_ids is not None:
        return _read_ids(args.prompt_ids)
    inline = args.prompt is not None and args.prompt != STDIN
    text = args.prompt if inline else _read_text(args.prompt_file or STDIN)
    if not text:
        raise ValueError("the prompt is empty (0 tokens); give at least one token")
    tokenizer = _load_tokenizer(args)
    return tokenizer.encode_chat([{"role": "user", "content": text}]) if args.chat else tokenizer.encode(text)


def _read_text(path: str) -> str:
    content = sys.stdin.buffer.read() if path == STDIN else Path(path).read_bytes()
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); a prompt file holds plain text") from error


def _read_ids(path: str) -> list[int]:
    try:
        ids = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path} is not JSON: {error}; write a list of token ids such as [1, 2, 3]"
        ) from error
    if not isinstance(ids, list):
        raise ValueError(f"{path} holds a {type(ids).__name__}; write a list of token ids such as [1, 2, 3]")
    return ids


def _load_tokenizer(args: argparse.Namespace) -> Tokenizer:
    from megatron_sps2.engine.tokenizer import load_tokenizer

    return load_tokenizer(args.checkpoint)


def _lead(args: argparse.Namespace, engine: Engine, prompt_ids: list[int]) -> int:
    from megatron_sps2.cli.answer import stream_answer
    from megatron_sps2.cli.report import Report, print_table

    # A model without tokenizer files can still be run on ids; its answer has no text.
    has_text = args.prompt_ids is None or (Path(args.checkpoint) / "tokenizer.json").is_file()
    tokenizer = _load_tokenizer(args) if has_text else None
    request = engine.add_request(prompt_ids, sampling_params(args))
    text = stream_answer(engine, request, tokenizer, show=not args.json)
    kv_tokens = engine.blocks.tokens_per_rank(request.request_id)
    engine.release(request)
    engine.stop()
    report = Report(
        request=request,
        text=text,
        model=engine.model,
        parallel=parallel_config(args),
        dtype=args.dtype,
        strategy=engine.last_strategy,
        kv_tokens_per_rank=kv_tokens,
        ledgers=engine.gather(engine.ledger),
    )
    if args.json:
        print(json.dumps(report.to_json()), flush=True)
    elif args.report:
        print_table(report)
    return 0
