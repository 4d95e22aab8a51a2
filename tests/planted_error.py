"""Runs `sps2` with a mistake planted inside a step of one rank: PLANTED_RANK raises in its second layer.

python -c "from tests.planted_error import main; main()" generate ...
"""

from __future__ import annotations

import argparse
import os
import sys
from unittest import mock

from megatron_sps2.cli import generate
from megatron_sps2.cli import main as command
from megatron_sps2.engine.plan import StepPlan
from megatron_sps2.engine.runner import Runner, StepResult

PLANTED = "planted: 13 is no number of layers"
# The real one, from before it is patched: a launcher's rank runs where the patch was made.
GENERATE = generate._generate


def main() -> None:
    with mock.patch.object(generate, "_generate", generate_with_error):
        sys.exit(command.main(sys.argv[1:]))


def generate_with_error(args: argparse.Namespace) -> int:
    """On every rank."""
    run_layers = Runner._run_layers

    def fail(self: Runner, plan: StepPlan) -> StepResult:
        if self._sp.axis.rank == int(os.environ["PLANTED_RANK"]) and any(
            p.first_layer == 1 for p in plan.pieces
        ):
            raise ValueError(PLANTED)
        return run_layers(self, plan)

    with mock.patch.object(Runner, "_run_layers", fail):
        return GENERATE(args)
