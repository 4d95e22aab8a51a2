"""Runs `sps2` with a mistake planted inside a step of one rank: PLANTED_RANK raises in its second layer.

python -c "from tests.planted_error import main; main()" generate ...
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any
from unittest import mock

from megatron_sps2.cli import generate
from megatron_sps2.cli import main as command
from megatron_sps2.engine.runner import Runner

PLANTED = "planted: 13 is no number of layers"


def main() -> None:
    with mock.patch.object(generate, "_generate", generate_with_error):
        sys.exit(command.main(sys.argv[1:]))


def generate_with_error(args: argparse.Namespace) -> int:
    """On every rank; a rank's process has imported the real function."""
    layers = Runner._layers

    def fail(self: Runner, first: int, *rest: Any) -> Any:
        if first == 1 and self._sp.axis.rank == int(os.environ["PLANTED_RANK"]):
            raise ValueError(PLANTED)
        return layers(self, first, *rest)

    with mock.patch.object(Runner, "_layers", fail):
        return generate._generate(args)
