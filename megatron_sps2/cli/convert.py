"""`sps2 convert SRC DST`: other people's checkpoints to a Megatron checkpoint folder."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.progress import Progress


def run(args: argparse.Namespace) -> int:
    from checkpoints_tools.convert import convert

    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(f"opening {args.source}", total=None)

        def show(what: str, done: int, total: int) -> None:
            # The file is written once the last weight has been read.
            text = f"writing {args.target}" if done == total else f"reading {what}"
            bar.update(task, description=text, completed=done, total=None if done == total else total)

        model = convert(args.source, args.target, dtype=args.dtype, force=args.force, progress=show)
    shape = f"{model.num_layers} layers, hidden {model.hidden_size}, vocabulary {model.vocab_size}"
    print(f"{args.target}: {shape}")
    return 0
