"""What a CUDA device's memory holds, as the driver and torch's allocator tell it. Knows no engine."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """In bytes. What torch keeps for itself without need is given back before it is measured."""

    total: int
    free: int  # of everybody, after the run
    peak: int  # that the run held at a time, beside what was there before


def measure_memory(run: Callable[[], None], device: torch.device) -> DeviceMemory:
    """Runs `run` and measures. Raises torch.OutOfMemoryError where it does not fit."""
    _clean(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    _clean(device)
    free, total = torch.cuda.mem_get_info(device)
    return DeviceMemory(total=total, free=free, peak=peak)


def name_of(device: torch.device) -> str:
    """Of the card itself: under SLURM every rank may call its own cuda:0."""
    return str(torch.cuda.get_device_properties(device).uuid)


def _clean(device: torch.device) -> None:
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
