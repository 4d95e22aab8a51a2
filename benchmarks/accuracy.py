"""What sparse attention costs in accuracy, beside what it sends: several settings on the same texts.

    python benchmarks/accuracy.py --checkpoint DIR --text FILE --tokens 4096 --sp 8 --needles 24 \\
        --settings dense,paper,default,default:floor=0.9,strided:degrees=1,4,4,4 --json OUT --plot PNG

A prompt is prefilled by a setting; what follows it runs exactly over the full cache, as decode does. One
process computes what --sp ranks would compute, and counts the bytes that they would send.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch

if not __package__:  # Run as a file: the packages lie beside this file's folder.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import texts
from benchmarks.accuracy_compare import Comparison, Row, cut_windows, make_tasks
from benchmarks.accuracy_plot import draw, table
from benchmarks.accuracy_run import lone_trial
from benchmarks.accuracy_settings import parse_settings
from megatron_sps2.config import DTYPES, KV_CACHE_DTYPES
from megatron_sps2.csa_setting import CsaSetting
from megatron_sps2.engine.tokenizer import load_tokenizer
from megatron_sps2.engine.trial import Trial
from megatron_sps2.engine.trial_prefill import Prefill, make_prefill
from megatron_sps2.model.manifest import read_manifest

Settings = dict[str, CsaSetting | None]
FACTS = ("tokens", "continuation", "sp", "samples", "dtype", "kv_cache_dtype")  # of every row


def main(argv: list[str] | None = None) -> None:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        rows = run(args, read_settings(args))
    except (ValueError, FileNotFoundError) as error:
        parser.exit(2, f"accuracy: {error}\n")
    print(table(rows))
    if args.plot:
        draw(rows, args.plot)


def read_settings(args: argparse.Namespace) -> Settings:
    """What --settings names, checked against the model together with the counts. Raises ValueError."""
    if not 0 < args.continuation < args.tokens:
        raise ValueError(
            f"--continuation {args.continuation} must be above 0 and below --tokens {args.tokens}"
        )
    for name, least in (("samples", 1), ("sp", 1), ("needles", 0), ("ruler", 0), ("answer", 0)):
        if getattr(args, name) < least:
            raise ValueError(f"--{name} {getattr(args, name)} must be at least {least}")
    settings, manifest = parse_settings(args.settings), read_manifest(args.checkpoint)
    for setting in settings.values():
        if setting:
            setting.check_model(manifest.model, manifest.content_id)
    if args.tokens > manifest.model.max_seq_len:
        raise ValueError(f"--tokens {args.tokens} is beyond the model's {manifest.model.max_seq_len}")
    return settings


def run(args: argparse.Namespace, settings: Settings) -> list[Row]:
    """A row for each setting; --json holds what is done so far after each."""
    dtype, rows = getattr(torch, args.dtype), list[Row]()
    about = {name: getattr(args, name) for name in FACTS}
    about["model"] = Path(args.checkpoint).name
    with lone_trial(args.checkpoint, dtype) as trial:
        comparison = prepare(args, trial)
        for name, setting in settings.items():

            def make(num_tokens: int, setting: CsaSetting | None = setting) -> Prefill:
                return make_prefill(setting, num_tokens, args.sp, trial.model, dtype.itemsize)

            row = comparison.measure(name, make) | about
            rows.append(row | {"csa_setting": asdict(setting) if setting else None})
            if args.json:
                args.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows


def prepare(args: argparse.Namespace, trial: Trial) -> Comparison:
    """Reads texts, makes tasks, and runs exact attention. Raises ValueError for texts that are too short."""
    tokenizer, num_prompt = load_tokenizer(args.checkpoint), args.tokens - args.continuation
    fillers = {Path(name).stem: texts.load(name, args.cache.expanduser()) for name in args.text}
    windows = [
        window
        for name, text in fillers.items()
        for window in cut_windows(name, tokenizer.encode(text), args.tokens, args.samples)
    ]
    tasks = list(make_tasks(tokenizer, list(fillers.values()), num_prompt, args.needles, args.ruler))
    longest = max((len(task.prompt_ids) + task.max_tokens for task in tasks), default=0)
    if longest > trial.model.max_seq_len:
        raise ValueError(f"a task of {longest} tokens is beyond the model's {trial.model.max_seq_len}")
    return Comparison(
        trial=trial,
        tokenizer=tokenizer,
        num_prompt=num_prompt,
        windows=windows,
        tasks=tasks,
        kv_cache_dtype=args.kv_cache_dtype,
        answer_tokens=args.answer,
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", required=True, help="converted checkpoint folder")
    add("--text", required=True, action="append", help=f"file, or {', '.join(texts.KINDS)}; may come again")
    add("--tokens", type=int, default=4096, help="of a window: prompt and continuation")
    add("--continuation", type=int, default=256, help="last tokens of a window, whose perplexity is taken")
    add("--samples", type=int, default=2, help="windows of each text")
    add("--sp", type=int, default=8, help="ranks whose bytes are counted; `paper` has as many segments")
    add(
        "--settings",
        default="dense,paper,default",
        help="dense, presets, JSON files; NAME:FIELD=VALUE changes one",
    )
    add("--needles", type=int, default=24, help="pass-key prompts, as long as a window's prompt")
    add("--ruler", type=int, nargs="?", const=4, default=0, help="prompts of each RULER-style task (4)")
    add("--answer", type=int, default=0, help="tokens of a greedy answer to each window's prompt")
    add("--dtype", default="float32", choices=DTYPES)
    add(
        "--kv-cache-dtype",
        default="auto",
        choices=KV_CACHE_DTYPES,
        help="fp8: every setting attends to keys and values rounded as the cache keeps them",
    )
    add(
        "--cache",
        type=Path,
        default=Path(os.environ.get("SPS2_CACHE", "~/.cache/megatron_sps2")),
        help="of texts",
    )
    add("--json", type=Path, help="rows go here, after each setting")
    add("--plot", type=Path, help="draws accuracy beside bytes into this PNG")
    return parser


if __name__ == "__main__":
    main()
