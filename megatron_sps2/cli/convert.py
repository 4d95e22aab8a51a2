"""`sps2 convert SRC DST`: checkpoints of one format to another."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from checkpoints_tools.target import check_target
from megatron_sps2.config import ModelConfig


def run(args: argparse.Namespace) -> int:
    # Again in there, but only once torch is loaded.
    check_target(Path(args.source), Path(args.target), args.force)
    from checkpoints_tools.convert import convert

    with bar(f"opening {args.source}", last=f"writing {args.target}") as show:
        model = convert(
            args.source,
            args.target,
            to=args.to,
            tp_size=args.tp,
            pp_size=args.pp,
            dtype=args.dtype,
            force=args.force,
            trust_pickle=args.trust_pickle,
            progress=show,
        )
    say(args.target, model)
    return 0


def say(target: str, model: ModelConfig) -> None:
    shape = f"{model.num_layers} layers, hidden {model.hidden_size}, vocabulary {model.vocab_size}"
    print(f"{target}: {shape}")


@contextmanager
def bar(first: str, last: str | None = None) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on a terminal's stderr. `last` is said once all weights have been read."""
    with Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(first, total=None)

        def show(what: str, done: int, total: int) -> None:
            is_last = last is not None and done == total
            text = last if is_last else f"reading {what}"
            progress.update(task, description=text, completed=done, total=None if is_last else total)

        yield show
