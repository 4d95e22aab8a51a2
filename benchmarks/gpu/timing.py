"""How long a call takes on a device, and inputs that its cache does not hold. Knows no kernel."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

WARM_UP = 3
MIN_CALLS, MAX_CALLS = 5, 100
# Of one measurement.
BUDGET_MS = 400.0
# Of inputs in turn: so many times the device's L2 cache.
CACHES = 3
MAX_SETS = 64
# Times what the host needs to launch all calls, in cycles of a clock of 2 GHz.
HEAD_START, CYCLES_A_MS = 1.5, 2e6


def milliseconds(call: Callable[[int], object], device: torch.device) -> float:
    """Median of call(0), call(1), ..., which use input sets in turn."""
    if device.type != "cuda":
        start = time.perf_counter()
        call(0)
        return 1e3 * (time.perf_counter() - start)
    for turn in range(WARM_UP):
        call(turn)
    first, on_host = _events(call, 1)[0], _host_milliseconds(call)
    num_calls = int(min(MAX_CALLS, max(MIN_CALLS, BUDGET_MS / max(first, 1e-3))))
    return statistics.median(_events(call, num_calls, HEAD_START * on_host * num_calls))


def on_every_turn(call: Callable[[], object]) -> Callable[[int], object]:
    """For `milliseconds`: the same call, with one set of inputs."""
    return lambda _: call()


def _host_milliseconds(call: Callable[[int], object]) -> float:
    """That the host needs to launch a call: more than the device, where a kernel is short."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    call(0)
    return 1e3 * (time.perf_counter() - start)


def _events(call: Callable[[int], object], num_calls: int, head_start_ms: float = 0.0) -> list[float]:
    """Milliseconds of each call on the device's own clock.

    The device sleeps first, and the calls queue up meanwhile: launches are hidden where calls do not wait.
    """
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(num_calls + 1)]
    torch.cuda.synchronize()
    torch.cuda._sleep(int(head_start_ms * CYCLES_A_MS))
    marks[0].record()
    for turn, mark in enumerate(marks[1:]):
        call(turn)
        mark.record()
    torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in zip(marks, marks[1:], strict=False)]


def num_sets(num_bytes: int, device: torch.device) -> int:
    """How many input sets of `num_bytes` in turn are never found in the L2 cache."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MAX_SETS, max(1, -(-CACHES * cache // max(1, num_bytes))))
