"""`sps2 generate`: one prompt in, one answer out, with its times and the bytes it sent."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sps2.cli.arguments import (
    attention_config,
    check_size_flags,
    csa_setting,
    parallel_config,
    sampling_params,
)
from megatron_sps2.cli.launch_arguments import check_launch
from megatron_sps2.cli.world import in_world
from megatron_sps2.config import ScheduleConfig
from megatron_sps2.engine.engine_config import EngineConfig
from megatron_sps2.model.manifest import load_model_config, read_manifest
from megatron_sps2.parallel.shared_error import mark_shared

if TYPE_CHECKING:
    from megatron_sps2.cli.report import Report
    from megatron_sps2.engine.engine import Engine
    from megatron_sps2.engine.request import Request
    from megatron_sps2.engine.tokenizer import Tokenizer

STDIN = "-"


def run(args: argparse.Namespace) -> int:
    return in_world(args, _generate, _check)


def _check(args: argparse.Namespace) -> None:
    if args.chat and args.prompt_ids is not None:
        raise ValueError(
            "--chat wraps a text, --prompt-ids gives tokens as they are; use one of them, or --prompt-file"
        )
    check_flags(args)


def check_flags(args: argparse.Namespace) -> None:
    """Raises ValueError or OSError for everything that can be wrong before a prompt is read."""
    check_engine_flags(args)
    sampling_params(args)


def check_engine_flags(args: argparse.Namespace) -> None:
    """The part of it that does not speak of an answer."""
    from megatron_sps2.attention.strategy import choose_strategy

    manifest = read_manifest(args.checkpoint)
    model = manifest.model
    check_size_flags(args, model)
    if args.attention != "exact" or args.csa_setting is not None:
        csa_setting(args).check_model(model, manifest.content_id)
    choose_strategy(
        attention_config(args).strategy,
        num_heads=model.num_attention_heads // args.tp,
        num_kv_heads=model.num_query_groups // args.tp,
        sp_size=args.sp,
        num_past=0,
    )
    check_launch(args)


def engine_config(args: argparse.Namespace, max_model_len: int) -> EngineConfig:
    return EngineConfig(
        checkpoint=args.checkpoint,
        parallel=parallel_config(args),
        attention=attention_config(args),
        csa=csa_setting(args) if args.attention != "exact" else None,
        dtype=args.dtype,
        kv_cache_dtype=args.kv_cache_dtype,
        enforce_eager=args.enforce_eager,
        max_model_len=max_model_len,
        block_size=args.block_size,
        timeout_s=args.timeout_s,
        # Progress is shown, and Ctrl-C heard, between two layers.
        schedule=ScheduleConfig(layers_per_piece=1),
        device="cpu" if args.device == "cpu" else "cuda",
    )


def _generate(args: argparse.Namespace) -> int:
    """On every rank; rank 0 speaks."""
    from megatron_sps2.engine.build import build_engine
    from megatron_sps2.parallel.collectives import from_first_rank

    tokenizer: Tokenizer | None = None

    def prepare() -> tuple[list[int], int]:
        nonlocal tokenizer  # rank 0's alone
        prompt = read_prompt(args)
        tokenizer = _load_tokenizer(args)
        return _measure(args, _encode(args, prompt, tokenizer))

    prompt_ids, longest = from_first_rank(prepare)
    engine = build_engine(engine_config(args, longest))
    args.heart.watch(engine.ledger.activity)
    if engine.is_leader:
        return _lead(args, engine, prompt_ids, tokenizer)
    engine.follow()
    engine.gather(engine.ledger)
    return 0


def _measure(args: argparse.Namespace, prompt_ids: list[int]) -> tuple[list[int], int]:
    """The prompt, and the tokens of prompt and answer that the cache must hold."""
    needed = max(1, len(prompt_ids) + args.max_tokens)
    return prompt_ids, args.max_model_len or min(needed, load_model_config(args.checkpoint).max_seq_len)


def read_prompt(args: argparse.Namespace) -> str | list[int]:
    """The prompt the flags name, text or ids. Raises ValueError or OSError naming what is wrong with it."""
    if args.prompt_ids is not None:
        return _read_ids(args.prompt_ids)
    if args.prompt is not None and args.prompt != STDIN:
        text: str = args.prompt
    else:
        text = _read_text(STDIN if args.prompt_file is None else args.prompt_file)
    if not text:
        raise ValueError("the prompt is empty (0 tokens); give at least one token")
    return text


def _encode(args: argparse.Namespace, prompt: str | list[int], tokenizer: Tokenizer | None) -> list[int]:
    if isinstance(prompt, list):
        return prompt
    assert tokenizer is not None, "text needs a tokenizer, which was loaded"
    if args.chat:
        return tokenizer.encode_chat([{"role": "user", "content": prompt}])
    return tokenizer.encode(prompt)


def _read_text(path: str) -> str:
    if not path:
        raise ValueError("the name of the prompt's file is empty; give a path, or - for stdin")
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


def _load_tokenizer(args: argparse.Namespace) -> Tokenizer | None:
    """None for a model without tokenizer files, which can still be run on ids; its answer has no text."""
    from megatron_sps2.engine.tokenizer import TOKENIZER_FILE, load_tokenizer

    if args.prompt_ids is not None and not (Path(args.checkpoint) / TOKENIZER_FILE).is_file():
        return None
    return load_tokenizer(args.checkpoint)


def _lead(
    args: argparse.Namespace, engine: Engine, prompt_ids: list[int], tokenizer: Tokenizer | None
) -> int:
    from megatron_sps2.cli.answer import NoAnswerError, stream_answer
    from megatron_sps2.cli.report import print_table

    # Only what comes while no rank is inside a step may send the others home; from inside one they are
    # waiting in another collective.
    try:
        request = engine.add_request(prompt_ids, sampling_params(args))
    except ValueError as error:
        _send_home(engine)
        mark_shared(error)
        raise
    try:
        text = stream_answer(engine, request, tokenizer, show=not args.json)
    except NoAnswerError:
        _send_home(engine)
        raise
    report = _finish(args, engine, request, text)
    if args.json:
        print(json.dumps(report.to_json()), flush=True)
    elif args.report:
        print_table(report)
    return 0


def _send_home(engine: Engine) -> None:
    engine.stop()
    engine.gather(None)


def _finish(args: argparse.Namespace, engine: Engine, request: Request, text: str) -> Report:
    """Ends all ranks' engines and gathers what they measured."""
    from megatron_sps2.cli.report import Report

    kv_tokens = engine.blocks.tokens_per_rank(request.request_id)
    engine.release(request)
    engine.stop()
    return Report(
        request=request,
        text=text,
        model=engine.model,
        parallel=parallel_config(args),
        dtype=args.dtype,
        strategy=engine.last_strategy,
        kv_tokens_per_rank=kv_tokens,
        ledgers=engine.gather(engine.ledger),
        start_up=engine.start_up,
    )
