"""Where a rank's time goes: seconds by name. Wall clock: it says little where work is queued (CUDA)."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

# What CSA does with its time. exchange is waiting for other ranks, for their data or because they are late,
# as far as computing does not hide it; the tail's two small exchanges are in tail.
CSA_SPANS = ("selection", "exchange", "local", "far", "tail")


class Spans:
    """Seconds spent inside `with spans(name)`, by name; spans do not nest."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start
