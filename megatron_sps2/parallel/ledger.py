"""The ledger: how many bytes this rank sent, by phase and collective, and where a trace of them goes.

Counts what leaves for other ranks; what a rank hands to itself is free. Knows no tensors and no groups.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_sps2.parallel.activity import Activity
from megatron_sps2.parallel.trace import Trace


class Ledger:
    """Bytes sent by this rank, keyed by (phase, collective)."""

    def __init__(self) -> None:
        # Where collectives are told with their times too; None: nowhere.
        self.trace: Trace | None = None
        self.activity = Activity()
        self._bytes: dict[tuple[str, str], int] = defaultdict(int)
        self._phase = "setup"

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Books everything sent inside the block under `name` ('prefill', 'decode', ...)."""
        before, self._phase = self._phase, name
        self.activity.phase = name
        try:
            yield
        finally:
            self._phase = before

    @contextmanager
    def aside(self) -> Iterator[dict[str, int]]:
        """Books nothing of what is sent inside the block; afterwards the dict has its bytes by collective."""
        booked, found = self._bytes, dict[str, int]()
        self._bytes = defaultdict(int)
        try:
            yield found
        finally:
            found.update(self.all_phases)
            self._bytes = booked

    def add(self, collective: str, num_bytes: int) -> None:
        self._bytes[self._phase, collective] += num_bytes
        self.activity.collective = collective

    @property
    def total_sent(self) -> int:
        """Bytes sent so far, over all phases and collectives."""
        return sum(self._bytes.values())

    def total(self, phase: str, *collectives: str) -> int:
        """Bytes sent in `phase`, over all collectives or over the named ones."""
        return sum(
            sent
            for (p, c), sent in self._bytes.items()
            if p == phase and (not collectives or c in collectives)
        )

    @property
    def all_phases(self) -> dict[str, int]:
        """Bytes sent so far by collective."""
        found: dict[str, int] = defaultdict(int)
        for (_, collective), sent in list(self._bytes.items()):
            found[collective] += sent
        return dict(found)

    def by_collective(self, phase: str) -> dict[str, int]:
        return {c: sent for (p, c), sent in sorted(self._bytes.items()) if p == phase}

    def clear(self) -> None:
        self._bytes.clear()
