"""The `sps2` command: parses, dispatches, and turns expected errors into one clear line.

Imports nothing heavy: torch comes in with the command that needs it.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from megatron_sps2 import __version__
from megatron_sps2.cli import arguments

USER_ERROR, RUN_ERROR = 2, 1

# Command -> (module with run(args) -> int, what it adds to the parser).
COMMANDS = {
    "generate": arguments.add_generate,
    "chat": arguments.add_chat,
    "convert": arguments.add_convert,
    "doctor": arguments.add_doctor,
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sps2", description="Serve long prompts over sequence-parallel ranks, on Megatron-core layers."
    )
    parser.add_argument("--version", action="version", version=f"sps2 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, add in COMMANDS.items():
        add(commands, name)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 for a run that failed, 2 for input that cannot be served."""
    args = build_parser().parse_args(argv)
    rank = os.environ.get("RANK", os.environ.get("SPS2_RANK", "0"))
    logging.basicConfig(
        level=args.log_level.upper(), format=f"%(asctime)s rank {rank} %(levelname)s %(name)s: %(message)s"
    )
    try:
        return int(importlib.import_module(f"megatron_sps2.cli.{args.command}").run(args))
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # The outermost loop: nothing above could say more than this line.
        return report(error)


def report(error: Exception) -> int:
    """One line on stderr, with the traceback at --log-level debug; the exit code."""
    from megatron_sps2.cli.world import is_first_rank, rank_label

    logging.getLogger(__name__).debug("failed", exc_info=error)
    is_users = isinstance(error, (ValueError, OSError)) and not isinstance(error, ConnectionError)
    # Every rank meets a user's mistake; one line is enough. What befell one rank is told by that rank.
    if not is_users or is_first_rank():
        text = str(error) or type(error).__name__
        if not isinstance(error, (ValueError, OSError, RuntimeError)):
            text = f"{type(error).__name__}: {text}"
        print(f"sps2: error: {rank_label()}{text}", file=sys.stderr, flush=True)
    return USER_ERROR if is_users else RUN_ERROR
