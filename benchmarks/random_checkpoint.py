"""The random 56M Llama as a checkpoint, with fixed CSA budgets: python -m benchmarks.random_checkpoint DIR.

Random weights attend to everything, so an adaptive budget would keep all keys: this one is what a real model
was measured to need (benchmarks/csa_speed.py).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from benchmarks.csa_speed import add_budgets, csa_setting
from benchmarks.side_by_side import random_llama
from checkpoints_tools.convert import convert
from megatron_sps2.csa_setting import CALIBRATION_NAME, save_setting


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    add_budgets(parser)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as hf:
        random_llama().save_pretrained(hf)
        convert(hf, args.folder)
    save_setting(csa_setting(args), args.folder / CALIBRATION_NAME)


if __name__ == "__main__":
    main()
