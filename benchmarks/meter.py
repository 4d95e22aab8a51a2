"""What one rank notes of each prompt's prefill: seconds inside core attention, bytes that attention sent.

Looks at an engine from outside: by torch's hooks, by the ledger, and by the plans it has run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from megatron_sps2.attention.core import SequenceParallelAttention
from megatron_sps2.engine.engine import Engine
from megatron_sps2.engine.plan import StepPlan
from megatron_sps2.parallel.traffic import CSA_COLLECTIVES, PREFILL_COLLECTIVES

_COLLECTIVES = set(PREFILL_COLLECTIVES) | set(CSA_COLLECTIVES)  # some are of both


@dataclass(slots=True)
class Note:
    """One prompt on one rank, over all layers. Wall clock counts waiting for others, CPU seconds do not."""

    strategy: str
    attention_s: float = 0.0
    attention_cpu_s: float = 0.0
    bytes_sent: int = 0


class Meter:
    """Notes of this process's engine, whose prompts must come one at a time."""

    def __init__(self, engine: Engine) -> None:
        assert engine.observe is None, "somebody observes this engine already"
        self._by_request: dict[int, Note] = {}
        self._ledger, self._sent = engine.ledger, 0
        self._wall = _Stopwatch(time.perf_counter)
        self._cpu = _Stopwatch(time.thread_time)
        engine.observe = self._ran
        register_module_forward_pre_hook(self._enter)
        register_module_forward_hook(self._leave)

    @property
    def notes(self) -> list[Note]:
        """In the order in which the prompts began."""
        return list(self._by_request.values())

    def _enter(self, module: nn.Module, *_: Any) -> None:
        if isinstance(module, SequenceParallelAttention):
            self._wall.start()
            self._cpu.start()

    def _leave(self, module: nn.Module, *_: Any) -> None:
        if isinstance(module, SequenceParallelAttention):
            self._wall.stop()
            self._cpu.stop()

    def _ran(self, plan: StepPlan, _: float, __: float) -> None:
        """After each plan: what it took is that of its prompt; a decode step's is dropped."""
        sent = self._ledger.total("prefill", *_COLLECTIVES)
        wall, cpu, more = self._wall.take(), self._cpu.take(), sent - self._sent
        self._sent = sent
        for piece in plan.pieces:
            note = self._by_request.setdefault(piece.request_id, Note(piece.strategy))
            note.attention_s += wall
            note.attention_cpu_s += cpu
            note.bytes_sent += more


class _Stopwatch:
    """Seconds between start and stop, added up until they are taken."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._started, self._total = clock, 0.0, 0.0

    def start(self) -> None:
        self._started = self._clock()

    def stop(self) -> None:
        self._total += self._clock() - self._started

    def take(self) -> float:
        total, self._total = self._total, 0.0
        return total
