"""A trace through dp replicas on a simulated clock: discrete events, one replica's steps at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_sps2.config import AttentionMode
from megatron_sps2.engine.request import Request
from megatron_sps2.simulator.arrivals import Arrival, make_request
from megatron_sps2.simulator.cost import CostModel
from megatron_sps2.simulator.outcome import Served, summary
from megatron_sps2.simulator.replica import Replica, Setup


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of every request, in the trace's order, and how busy the replicas were."""

    served: list[Served]
    busy_s: list[float]  # of each replica
    by_kind_s: dict[str, float]  # seconds of steps, over all replicas
    bytes_sent_per_rank: float  # the mean over replicas

    def to_json(self) -> dict[str, Any]:
        found = summary(self.served)
        seconds = found["duration_s"]
        return found | {
            "utilization": [busy / seconds if seconds else 0.0 for busy in self.busy_s],
            "seconds_by_kind": self.by_kind_s,
            "bytes_sent_per_rank": self.bytes_sent_per_rank,
        }


def simulate(
    setup: Setup, cost: CostModel, planned: Sequence[Arrival], attention: AttentionMode = "exact"
) -> Outcome:
    """Every request goes to the replica with the least to do, as the front end sends it."""
    replicas = [Replica(setup, cost) for _ in range(setup.parallel.dp_size)]
    requests: dict[int, Request] = {}
    lengths = [each.num_prompt_tokens for each in planned]
    for number in sorted(range(len(planned)), key=lambda i: (planned[i].arrival_s, i)):
        for replica in replicas:
            replica.advance(planned[number].arrival_s)
        chosen = min(replicas, key=lambda each: each.load)
        chosen.submit(requests.setdefault(number, make_request(planned[number], number, attention)))
    for replica in replicas:
        replica.advance(math.inf)
    by_kind: dict[str, float] = {}
    for replica in replicas:
        for kind, seconds in replica.busy.by_kind.items():
            by_kind[kind] = by_kind.get(kind, 0.0) + seconds
    return Outcome(
        served=[_served(requests[number], lengths[number]) for number in range(len(planned))],
        busy_s=[replica.busy.seconds for replica in replicas],
        by_kind_s=by_kind,
        bytes_sent_per_rank=sum(each.busy.bytes_sent for each in replicas) / len(replicas),
    )


def _served(request: Request, num_prompt_tokens: int) -> Served:
    assert request.finish_reason is not None, f"request {request.request_id} never ended"
    return Served(
        arrival_s=request.arrived_at,
        num_prompt_tokens=num_prompt_tokens,
        token_times=tuple(request.token_times),
        error=request.error,
        num_preemptions=request.num_preemptions,
        num_pauses=request.num_pauses,
    )
