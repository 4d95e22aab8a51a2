"""The `sps2` command: parses, dispatches, and turns expected errors into one clear line.

Imports nothing heavy: torch comes in with the command that needs it.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence

from megatron_sps2 import __version__
from megatron_sps2.cli import (
    arguments,
    bench_arguments,
    checkpoint_arguments,
    doctor_arguments,
    serve_arguments,
    simulator_arguments,
)
from megatron_sps2.cli.config_file import insert_config
from megatron_sps2.cli.process import INTERRUPTED, leave, report, set_logging
from megatron_sps2.parallel import garbage
from megatron_sps2.parallel.rank_env import launched_rank

# Command -> what it adds to the parser; megatron_sps2.cli.COMMAND has run(args) -> exit code.
COMMANDS = {
    "generate": arguments.add_generate,
    "chat": arguments.add_chat,
    "serve": serve_arguments.add_serve,
    "convert": checkpoint_arguments.add_convert,
    "reshard": checkpoint_arguments.add_reshard,
    "verify": checkpoint_arguments.add_verify,
    "inspect": checkpoint_arguments.add_inspect,
    "doctor": doctor_arguments.add_doctor,
    "csa": arguments.add_csa,
    "bench": bench_arguments.add_bench,
    "profile": simulator_arguments.add_profile,
    "simulate": simulator_arguments.add_simulate,
    "plan": simulator_arguments.add_plan,
}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sps2",
        description="Serve long prompts over sequence-parallel ranks, on Megatron-core layers.",
        epilog="`sps2 COMMAND --help` lists a command's flags and their defaults.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sps2 {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, add in COMMANDS.items():
        add(commands, name)
    return parser


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The settings of one command. Flags on the command line win over those of a --config file."""
    parser = build_parser()
    return parser.parse_args(insert_config(parser, list(argv)))


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 1 for a run that failed, 2 for input that cannot be served."""
    garbage.look_less()
    args = parse_args(sys.argv[1:] if argv is None else argv)
    set_logging(args.log_level)
    if (skipped := getattr(args, "skipped_settings", None)) and (launched_rank() or (0,))[0] == 0:
        logging.getLogger(__name__).info(skipped)
    try:
        return int(importlib.import_module(f"megatron_sps2.cli.{args.command}").run(args))
    except KeyboardInterrupt:
        return leave(INTERRUPTED)
    except Exception as error:  # The outermost loop: nothing above could say more than this line.
        return leave(report(error))
