"""Loading a random model of about 1 GB at tp 1 and 2: Megatron's loading with torch's reader, and with ours.

Seconds, and memory beyond what the process held before, of the rank that took most; the two ways by turns.
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.convert_memory import MEGABYTE, make_model

ROUNDS = 3


def load_here(folder: str, tp_size: int, ours: bool) -> tuple[float, float]:
    """On a rank: seconds of load_gpt, and the growth of the peak of its memory in bytes."""
    import contextlib
    import time

    import torch

    import megatron_sps2.model.eager  # noqa: F401
    from megatron_sps2.attention.core import SequenceParallelAttention, StepContext
    from megatron_sps2.config import ParallelConfig
    from megatron_sps2.engine.start_up import peak_bytes
    from megatron_sps2.model import checkpoint
    from megatron_sps2.parallel.groups import ParallelGroups

    groups = ParallelGroups.create(ParallelConfig(tp_size=tp_size))
    core = functools.partial(SequenceParallelAttention, context=StepContext())
    with contextlib.ExitStack() as stack:
        if not ours:
            stack.enter_context(mock.patch.object(checkpoint, "MappedLoad", lambda: None))
            stack.enter_context(mock.patch.object(checkpoint, "_read_in_place", lambda sharded: None))
        before, start = peak_bytes(), time.perf_counter()
        checkpoint.load_gpt(folder, groups.to_megatron(), core, torch.float32)
        return time.perf_counter() - start, peak_bytes() - before


def measure(folder: Path, tp_size: int, ours: bool) -> tuple[float, float]:
    """Of the rank that took most."""
    from tests.ranks import run_ranks

    found: list[Any] = run_ranks(tp_size, load_here, str(folder), tp_size, ours)
    return max(seconds for seconds, _ in found), max(peak for _, peak in found)


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    from checkpoints_tools.convert import convert

    with tempfile.TemporaryDirectory() as name:
        make_model(Path(name) / "hf")
        convert(Path(name) / "hf", Path(name) / "core")
        print("| tp | reader | seconds, best of 3 | peak beyond the start, MB |\n|---|---|---|---|")
        for tp_size in (1, 2):
            rounds = [
                {ours: measure(Path(name) / "core", tp_size, ours) for ours in (False, True)}
                for _ in range(ROUNDS)
            ]
            for ours, reader in ((False, "torch's"), (True, "mapped")):
                seconds, peak = (min(each[ours][i] for each in rounds) for i in (0, 1))
                print(f"| {tp_size} | {reader} | {seconds:.2f} | {peak / MEGABYTE:,.0f} |")


if __name__ == "__main__":
    main()
