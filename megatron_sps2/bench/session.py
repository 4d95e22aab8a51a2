"""One workload against one endpoint: warmed up, then sent. Knows no flags and prints nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from megatron_sps2.bench.arrivals import ArrivalConfig, arrival_times
from megatron_sps2.bench.client import Endpoint, run
from megatron_sps2.bench.record import Record
from megatron_sps2.bench.trace import Planned
from megatron_sps2.bench.workload import Ask, WorkloadConfig, build, scaled

# Far from the seeds of a run, so that no warm-up leaves a prefix in the cache that the run asks for.
WARM_UP_SALT = 1_000_003


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """What is sent where, and when."""

    endpoint: Endpoint
    planned: Sequence[Planned]
    workload: WorkloadConfig
    arrivals: ArrivalConfig
    corpus: Sequence[int] | None = None
    max_concurrency: int | None = None

    def asks(self, salt: int = 0) -> list[Ask]:
        """The requests; each `salt` gives the same lengths and times, and other tokens."""
        config = replace(self.workload, seed=self.workload.seed + salt)
        asks = build(self.planned, config, self.corpus)
        return [replace(ask, arrival_s=time) for ask, time in zip(asks, self.times(), strict=True)]

    def times(self) -> list[float]:
        """When each request is sent."""
        traced = [each.arrival_s for each in scaled(self.planned, self.workload)]
        return arrival_times(self.arrivals, traced)

    async def warm_up(self, num_requests: int) -> list[Record]:
        """The first requests with tokens of their own, one by one."""
        asks = self.asks(WARM_UP_SALT)[:num_requests]
        return await run([replace(ask, arrival_s=0.0) for ask in asks], self.endpoint, max_concurrency=1)

    async def send(self, salt: int = 0, on_done: Callable[[Record], None] | None = None) -> list[Record]:
        return await run(
            self.asks(salt), self.endpoint, max_concurrency=self.max_concurrency, on_done=on_done
        )
