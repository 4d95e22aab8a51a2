"""Ranks of a benchmark: one that dies is told, and nobody waits for it."""

from __future__ import annotations

import os
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from benchmarks.engine_ranks import LEAVE_S, EngineRanks
from megatron_sps2.config import ParallelConfig
from megatron_sps2.engine.build import EngineConfig
from megatron_sps2.engine.engine import Engine
from tests.sps2_command import make_checkpoint


def echo_or_die(engine: Engine, pipe: Connection) -> None:
    """The second rank dies of the first plan that it gets; the first sends it one where it is asked to."""
    if not engine.is_leader:
        engine.follow()
        os._exit(3)
    while (job := pipe.recv()) is not None:
        if job == "die":
            engine.stop()
            time.sleep(600)
        pipe.send(job)
    engine.stop()


def test_a_rank_that_dies_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the first rank lives, and would never answer."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    config = EngineConfig(
        checkpoint=make_checkpoint(tmp_path), parallel=ParallelConfig(sp_size=2), max_model_len=64
    )
    ranks = EngineRanks(config, echo_or_die)
    try:
        assert ranks.ask("job") == "job"
        with pytest.raises(RuntimeError, match=r"ended before it answered \(exit codes \[None, 3\]"):
            ranks.ask("die")
    finally:
        start = time.monotonic()
        ranks.close()
    assert time.monotonic() - start < LEAVE_S / 2, "the others are not waited for"
