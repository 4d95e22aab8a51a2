"""A rank's heartbeat: a thread that tells the front end twice a second that it lives, and what it did.

It beats in the middle of a long step too; a process that is stopped, or gone, is silent. Knows no scheduler.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections import deque

import psutil
import zmq

from megatron_sps2.engine.engine import Engine
from megatron_sps2.engine.plan import StepPlan
from megatron_sps2.engine.start_up import peak_bytes
from megatron_sps2.server.beats import connect
from megatron_sps2.server.protocol import BEAT_S, Beat, StepRecord, encode

# A front end that is away must not make the rank's memory grow.
MAX_STEPS_KEPT = 2000


class Pulse:
    """`with Pulse(engine, endpoint, world):` the rank beats; its engine is watched meanwhile."""

    def __init__(self, engine: Engine, endpoint: str, world: int) -> None:
        self._engine, self._endpoint, self._world = engine, endpoint, world
        self._steps: deque[StepRecord] = deque(maxlen=MAX_STEPS_KEPT)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="pulse", daemon=True)

    def __enter__(self) -> Pulse:
        self._engine.observe = self._note
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._engine.observe = None
        self._ended.set()
        self._thread.join(timeout=2.0)

    def _note(self, plan: StepPlan, start: float, seconds: float) -> None:
        if not plan.is_empty:
            self._steps.append(step_record(plan, self._engine.place.sp_rank, start, seconds))

    def _beat(self) -> None:
        with connect(self._endpoint) as beats:
            while True:
                with contextlib.suppress(zmq.Again):  # nobody listens, or too slowly
                    beats.send(encode(self._state()), zmq.NOBLOCK)
                if self._ended.wait(BEAT_S):
                    return

    def _state(self) -> Beat:
        engine, place = self._engine, self._engine.place
        return Beat(
            world=self._world,
            rank=place.rank,
            replica=place.replica,
            sp_rank=place.sp_rank,
            tp_rank=place.tp_rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            time=time.time(),
            num_used_blocks=engine.num_used_blocks,
            bytes_sent=engine.ledger.all_phases,
            rss_bytes=psutil.Process().memory_info().rss,
            peak_bytes=peak_bytes(),
            steps=[self._steps.popleft() for _ in range(len(self._steps))],
        )


def step_record(plan: StepPlan, sp_rank: int, start: float, seconds: float) -> StepRecord:
    """What sp rank `sp_rank` did in a step; of a prompt that is spread about its own share of the tokens."""
    layers = [(piece.first_layer, piece.last_layer) for piece in plan.pieces]
    mine = [token for token in plan.decode if token.home == sp_rank]
    return StepRecord(
        kind=plan.kind,
        start=start,
        seconds=seconds,
        first_layer=layers[0][0] if layers else 0,
        last_layer=layers[0][1] if layers else 0,
        num_prompt_tokens=sum(
            piece.stop - piece.start for piece in plan.pieces if piece.home in (None, sp_rank)
        ),
        num_decodes=len(mine),
        requests=[piece.request_id for piece in plan.pieces] + [token.request_id for token in plan.decode],
    )
