"""A snapshot of the server for its live page: requests in flight, ranks, recent steps and times."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import numpy as np

from megatron_sps2.server.engine_client import Stream
from megatron_sps2.server.metrics import RECENT_S, Recent
from megatron_sps2.server.service import Service

MAX_REQUESTS = 200
STEPS_S = 10.0
RATE_S = 10.0


def live_state(service: Service, since: float) -> dict[str, Any]:
    """Steps that began after `since` (unix seconds), of the last ten seconds."""
    client, metrics, now = service.client, service.metrics, time.time()
    stats = client.stats.values()
    streams = sorted(client.streams.values(), key=lambda stream: stream.submitted_at)
    return {
        "state": client.state,
        "model": service.config.served_model_name,
        "policy": next((ready.policy for ready in client.replicas.values()), ""),
        "now": now,
        "ranks": _ranks(service),
        "requests": [_request(stream) for stream in streams[:MAX_REQUESTS]],
        "num_waiting": sum(each.num_waiting + each.num_swapped for each in stats),
        "num_running": sum(each.num_running for each in stats),
        "num_prefilling": sum(each.num_prefilling for each in stats),
        "num_paused": sum(each.num_paused for each in stats),
        "tokens_per_s": {
            "prompt": sum(metrics.prompt_tokens.within(RATE_S)) / RATE_S,
            "generation": sum(metrics.generated_tokens.within(RATE_S)) / RATE_S,
        },
        "ttft_ms": _percentiles(metrics.ttft_s),
        "tbt_ms": _percentiles(metrics.tbt_s),
        "steps": [
            {"rank": rank, **dict(zip(step.__struct_fields__, msgspec.to_builtins(step), strict=True))}
            for rank, step in metrics.steps
            if step.start > max(since, now - STEPS_S)
        ],
    }


def _ranks(service: Service) -> list[dict[str, Any]]:
    client, now = service.client, time.monotonic()
    return [
        {
            "rank": rank,
            "replica": state.beat.replica,
            "sp_rank": state.beat.sp_rank,
            "tp_rank": state.beat.tp_rank,
            "host": state.beat.host,
            "pid": state.beat.pid,
            "beat_age_s": now - state.seen_at,
            "kv_used_blocks": state.beat.num_used_blocks,
            "kv_total_blocks": ready.num_blocks if (ready := client.replicas.get(state.beat.replica)) else 0,
            "rss_bytes": state.beat.rss_bytes,
        }
        for rank, state in sorted(client.ranks.items())
    ]


def _request(stream: Stream) -> dict[str, Any]:
    first = stream.first_token_at
    return {
        "id": stream.request_id,
        "state": "waiting" if first is None else "running",
        "num_prompt_tokens": stream.num_prompt_tokens,
        "num_generated": stream.num_generated,
        "age_s": time.monotonic() - stream.submitted_at,
        "ttft_ms": None if first is None else 1e3 * (first - stream.submitted_at),
    }


def _percentiles(recent: Recent) -> dict[str, float | None]:
    values = recent.within(RECENT_S)
    if not values:
        return {"p50": None, "p99": None}
    return {"p50": 1e3 * float(np.percentile(values, 50)), "p99": 1e3 * float(np.percentile(values, 99))}
