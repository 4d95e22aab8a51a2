"""When this rank did what: steps, layers, collectives, as Chrome's trace viewer and Perfetto read them.

Knows names and times, not what they mean.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# Enough for an hour of a busy server; what comes later is counted and dropped.
MAX_EVENTS = 2_000_000

Event = tuple[str, str, float, float]  # name, track, start and length in microseconds


class Trace:
    """Events of one rank, in order of their end."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.num_dropped = 0

    def now(self) -> float:
        """Microseconds of the wall clock, which ranks of one host share."""
        return time.time_ns() / 1e3

    def add(self, name: str, track: str, start: float) -> None:
        """An event from `start` until now."""
        if len(self.events) < MAX_EVENTS:
            self.events.append((name, track, start, self.now() - start))
        else:
            self.num_dropped += 1

    @contextmanager
    def span(self, name: str, track: str) -> Iterator[None]:
        start = self.now()
        try:
            yield
        finally:
            self.add(name, track, start)


def write_trace(path: str | Path, ranks: Sequence[Iterable[Event]]) -> None:
    """One file of all ranks' events: a process for each rank, a thread for each track."""
    with Path(path).open("w", encoding="utf-8") as file:
        file.write('{"displayTimeUnit":"ms","traceEvents":[\n')
        for index, event in enumerate(_chrome_events(ranks)):
            file.write((",\n" if index else "") + json.dumps(event))
        file.write("\n]}\n")


def _chrome_events(ranks: Sequence[Iterable[Event]]) -> Iterator[dict[str, Any]]:
    for rank, events in enumerate(ranks):
        tracks: dict[str, int] = {}
        yield {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}}
        for name, track, start, length in events:
            if track not in tracks:
                tracks[track] = len(tracks)
                named = {"ph": "M", "name": "thread_name", "pid": rank, "tid": tracks[track]}
                yield {**named, "args": {"name": track}}
            event = {"ph": "X", "name": name, "cat": track, "ts": round(start, 1), "dur": round(length, 1)}
            yield {**event, "pid": rank, "tid": tracks[track]}
