"""An engine on processes of its own, one a rank and with one thread each. Knows no model and no measurement.

What every rank does is told as a function; its first rank gets jobs through a pipe until one is None.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import torch

from megatron_sps2.engine.build import EngineConfig, build_engine
from megatron_sps2.engine.engine import Engine

Program = Callable[[Engine, Connection], None]
POLL_S = 0.5
# How long ranks may take to end by themselves.
LEAVE_S = 20


class EngineRanks:
    """Starts at once; `program` must be found by its module's name."""

    def __init__(self, config: EngineConfig, program: Program) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "megatron_sps2.engine.build"])
        self._folder = tempfile.TemporaryDirectory()
        self._pipe, far = context.Pipe()
        store = f"{self._folder.name}/store"
        self._ranks = [
            context.Process(target=_rank, args=(rank, config, store, far, program), daemon=True)
            for rank in range(config.parallel.world_size)
        ]
        for rank in self._ranks:
            rank.start()
        far.close()  # the ranks hold it; once they are gone, the pipe ends

    def ask(self, job: Any) -> Any:
        """Raises RuntimeError where a rank ended before the answer."""
        with suppress(OSError):  # `receive` says who ended
            self._pipe.send(job)
        return self.receive()

    def receive(self) -> Any:
        """The next answer. Raises RuntimeError where a rank ended before it."""
        try:
            while not self._pipe.poll(POLL_S):
                if self._has_failed:
                    raise EOFError
            return self._pipe.recv()
        except (EOFError, OSError):
            codes = [rank.exitcode for rank in self._ranks]
            raise RuntimeError(
                f"a rank ended before it answered (exit codes {codes}, None: it runs); its error stands above"
            ) from None

    def finish(self) -> None:
        """Sends the last job; `close` follows."""
        with suppress(OSError):
            self._pipe.send(None)

    def close(self) -> None:
        """Ends the ranks, at once where one has failed."""
        self.finish()
        for rank in self._ranks:
            rank.join(0 if self._has_failed else LEAVE_S)
            rank.kill()
        self._pipe.close()
        self._folder.cleanup()

    @property
    def _has_failed(self) -> bool:
        return any(rank.exitcode for rank in self._ranks)


def _rank(rank: int, config: EngineConfig, store: str, pipe: Connection, program: Program) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=config.parallel.world_size
    )
    program(build_engine(config), pipe)
