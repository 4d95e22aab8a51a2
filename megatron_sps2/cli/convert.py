"""`sps2 convert SRC DST`: other people's checkpoints to a Megatron checkpoint folder."""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.progress import Progress


def run(args: argparse.Namespace) -> int:
    from checkpoints_tools.convert import convert

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("reading")
        model = convert(
            args.source,
            args.target,
            dtype=args.dtype,
            force=args.force,
            progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
    print(f"{args.target}: {model.num_layers} layers, hidden {model.hidden_size}, vocabulary {model.vocab_size}")
    return 0
