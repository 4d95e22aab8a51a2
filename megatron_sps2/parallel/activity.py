"""What a rank does right now, for the others' log when it falls silent. Knows no sockets."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

BETWEEN = "between steps"


@dataclass(slots=True)
class Activity:
    """Written by the rank's own thread, read by its heartbeat: single values, no lock needed."""

    step: int = 0  # engine steps begun
    phase: str = BETWEEN  # as the ledger books it
    layer: int | None = None
    collective: str = ""  # the newest that was started
    waiting_since: float | None = None  # time.monotonic(), while it waits for other ranks' data

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self.waiting_since = time.monotonic()
        try:
            yield
        finally:
            self.waiting_since = None

    @property
    def is_busy(self) -> bool:
        """In a step, and not waiting."""
        return self.phase != BETWEEN and self.waiting_since is None

    def begin_step(self) -> None:
        self.step += 1

    def end_step(self) -> None:
        self.phase, self.layer = BETWEEN, None

    @property
    def waited_s(self) -> float:
        since = self.waiting_since
        return time.monotonic() - since if since is not None else 0.0

    def in_words(self) -> str:
        """'step 17, prefill, layer 3, exchange_k': the newest collective, done or under way."""
        if not self.step:
            return "starting"
        layer = f"layer {self.layer}" if self.layer is not None else ""
        return ", ".join(filter(None, (f"step {self.step}", self.phase, layer, self.collective)))
