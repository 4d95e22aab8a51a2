"""Rounds of a comparison: every setting in turn replays the same requests, in an order that rotates.

Nothing else runs during a turn, so that what drifts from minute to minute falls on all settings alike. Knows
the client and the fleet, not what is made of the records.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from megatron_sps2.bench.arrivals import ArrivalConfig
from megatron_sps2.bench.client import Endpoint
from megatron_sps2.bench.fleet import Fleet
from megatron_sps2.bench.record import Record
from megatron_sps2.bench.session import Session
from megatron_sps2.bench.trace import Planned
from megatron_sps2.bench.workload import WorkloadConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What is replayed: each load in each round, by every setting."""

    settings: Sequence[str]
    loads: Sequence[float]  # times between arrivals are multiplied by them: 4 is a quarter of the load of 1
    num_rounds: int
    workload: WorkloadConfig  # its time_scale is the load's
    arrivals: ArrivalConfig = field(default_factory=ArrivalConfig)
    max_concurrency: int | None = None
    num_warmups: int = 2  # requests that each server gets before it is measured
    model: str = "compared"
    timeout_s: float = 3600.0

    def __post_init__(self) -> None:
        for load in self.loads:
            if not 0 < load < float("inf"):
                raise ValueError(
                    f"--loads: time scale {load} must be above 0 and finite; 2 is half the load of 1"
                )
        if not self.loads or len(set(self.loads)) < len(self.loads):
            raise ValueError(f"--loads {list(self.loads)} must name at least one, and each once")
        if len(self.loads) > 1 and self.arrivals.kind == "closed":
            raise ValueError(
                f"--loads {list(self.loads)}: closed arrivals have one load; give --request-rate"
            )
        if self.num_rounds < 1:
            raise ValueError(f"--rounds {self.num_rounds} must be at least 1")
        if self.num_warmups < 0:
            raise ValueError(f"--num-warmups {self.num_warmups} must be 0 (none) or above")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """One setting's records of one round at one load."""

    load: float
    round: int
    setting: str
    records: Sequence[Record]


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """The requests of one round at one load, and in which order the settings get them."""

    load: float
    round: int
    order: Sequence[str]
    planned: Sequence[Planned]
    # Of its tokens. No two replays have the same, even where hash ids are: a server's prefix cache finds what
    # the trace repeats within a round, and nothing of an earlier turn.
    salt: int


def replays(schedule: Schedule, planned: Sequence[Planned]) -> Iterator[Replay]:
    """All of them, loads within rounds."""
    if len(schedule.loads) > 1 and schedule.arrivals.request_rate == math.inf and _at_once(planned):
        raise ValueError(
            f"--loads {list(schedule.loads)}: all requests come at once; give a --request-rate to scale"
        )
    for number, part in enumerate(parts(planned, schedule.num_rounds)):
        for index, load in enumerate(schedule.loads):
            yield Replay(
                load=load,
                round=number,
                order=rotated(schedule.settings, number + index),
                planned=part,
                salt=number * len(schedule.loads) + index,
            )


def session(
    schedule: Schedule, replay: Replay, base_url: str, corpus: Sequence[int] | None = None
) -> Session:
    """What one turn sends. A load is a rate, where one is given; rounds have arrivals of their own."""
    rate, seed = schedule.arrivals.request_rate, schedule.arrivals.seed
    return Session(
        endpoint=Endpoint(base_url=base_url, model=schedule.model, timeout_s=schedule.timeout_s),
        planned=replay.planned,
        workload=replace(schedule.workload, time_scale=replay.load),
        arrivals=replace(schedule.arrivals, request_rate=rate / replay.load, seed=seed + replay.round),
        corpus=corpus,
        max_concurrency=schedule.max_concurrency,
    )


def _at_once(planned: Sequence[Planned]) -> bool:
    return len({each.arrival_s for each in planned}) <= 1


def parts(planned: Sequence[Planned], count: int) -> list[list[Planned]]:
    """The trace cut into `count` parts of as equal a number of requests as can be, each from 0 s on."""
    if len(planned) < count:
        raise ValueError(
            f"{len(planned)} requests cannot be cut into {count} rounds; use a larger --num-requests, or "
            "fewer --rounds"
        )
    bounds = [round(i * len(planned) / count) for i in range(count + 1)]
    cut = [list(planned[start:end]) for start, end in zip(bounds, bounds[1:], strict=False)]
    return [[replace(each, arrival_s=each.arrival_s - part[0].arrival_s) for each in part] for part in cut]


def rotated(names: Sequence[str], by: int) -> list[str]:
    """Each name comes at each place once in as many rounds as there are names."""
    by %= len(names)
    return [*names[by:], *names[:by]]


def take_turns(
    fleet: Fleet,
    schedule: Schedule,
    planned: Sequence[Planned],
    corpus: Sequence[int] | None = None,
    on_start: Callable[[Replay, str], None] = lambda replay, name: None,
    on_done: Callable[[Record], None] = lambda record: None,
) -> Iterator[Turn]:
    """Every turn of the comparison, as it ends. Raises RuntimeError where a server is lost."""
    warm = set[int]()
    for replay in replays(schedule, planned):
        for name in replay.order:
            with fleet.turn(name) as server:
                sent = session(schedule, replay, server.base_url, corpus)
                if server.process.pid not in warm:  # one server at a time: each is a new one
                    warm.add(server.process.pid)
                    _warm_up(name, sent, schedule.num_warmups)
                on_start(replay, name)
                records = asyncio.run(sent.send(replay.salt, on_done))
            yield Turn(load=replay.load, round=replay.round, setting=name, records=records)


def _warm_up(name: str, sent: Session, num_requests: int) -> None:
    failed = [each.error for each in asyncio.run(sent.warm_up(num_requests)) if not each.ok]
    if failed:
        raise RuntimeError(f"setting {name}: a warm-up request failed: {failed[0]}")
