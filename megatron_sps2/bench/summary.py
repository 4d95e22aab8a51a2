"""From records to numbers, under the names that `vllm bench serve` writes. Knows no endpoint.

TTFT is from sending to the first token, E2E to the last; TPOT is an answer's mean time per token after the
first, and TBT (vLLM's itl) each single gap.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_sps2.bench.client import Record

METRICS = ("ttft", "tpot", "itl", "e2el")
PERCENTILES = (50, 90, 99)


def summarize(
    records: Sequence[Record], duration_s: float | None = None, slos: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Counts, throughputs and {mean,median,std,p50,p90,p99,max}_{ttft,tpot,itl,e2el}_ms.

    `duration_s` is from the first request sent to the last one's end unless given (pooled runs: their sum).
    `slos` are goodput limits in ms by ttft, tpot, e2el.
    """
    raise NotImplementedError


def per_request(records: Sequence[Record]) -> dict[str, list[Any]]:
    """vLLM's detailed lists, in seconds: input_lens, output_lens, ttfts, itls, start_times, errors, ..."""
    raise NotImplementedError
