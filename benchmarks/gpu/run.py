"""Everything of one GPU in one go: python benchmarks/gpu/run.py --out DIR [--quick].

Right first, then how fast: results.json and a table, results.md, under DIR; the table is printed last. Exit
code 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

if not __package__:  # started as a file: the repository need not be installed
    sys.path[0] = str(Path(__file__).resolve().parents[2])


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    warnings.filterwarnings("ignore", module="megatron")  # it says at every import what it does without
    if args.device == "cpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: before any import
    from benchmarks.gpu.sections import run_sections

    return run_sections(args)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="where results.json and results.md go"
    )
    parser.add_argument("--quick", action="store_true", help="smaller shapes, less than two minutes")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="some sections alone")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="toy shapes: with --device cpu a check of this script, no measurement",
    )
    args = parser.parse_args(argv)
    if args.device == "cpu" and not args.tiny:
        parser.error("--device cpu runs kernels in Triton's interpreter, which is slow: give --tiny")
    return args


if __name__ == "__main__":
    sys.exit(main())
