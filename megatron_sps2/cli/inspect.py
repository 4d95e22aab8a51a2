"""`sps2 inspect DIR`: what a checkpoint is, without reading a weight."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from checkpoints_tools.target import check_source


def run(args: argparse.Namespace) -> int:
    check_source(Path(args.source))
    from checkpoints_tools.inspect import inspect

    found = inspect(args.source, trust_pickle=args.trust_pickle)
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    table = Table(show_header=False, box=None)
    model = found.pop("model")
    for name, value in (*found.items(), *model.items()):
        if value not in (None, False, [], ()):
            shown = f"{value:,}" if type(value) is int and value >= 10_000 else str(value)
            table.add_row(name, shown)
    Console().print(table)
    return 0
