"""From records to numbers, under the names that `vllm bench serve` writes. Knows no endpoint.

TTFT is from sending to the first token, E2E to the last; TPOT is an answer's mean time per token after the
first, and TBT (vLLM's itl) each single gap. Only requests that were answered whole count.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from megatron_sps2.bench.record import Record

METRICS = ("ttft", "tpot", "itl", "e2el")
GOODPUT_METRICS = ("ttft", "tpot", "e2el")
PERCENTILES = (50, 90, 99)


def summarize(
    records: Sequence[Record], duration_s: float | None = None, slos: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Counts, throughputs and {mean,median,std,p50,p90,p99,max}_{ttft,tpot,itl,e2el}_ms.

    `duration_s` is from the first request sent to the last one's end unless given (pooled runs: their sum).
    `slos` are goodput limits in ms by ttft, tpot, e2el. A statistic of nothing is None.
    """
    done = [each for each in records if each.ok]
    duration = span_s(records) if duration_s is None else duration_s
    found = _counts(records, done) | _throughputs(done, duration, slos or {})
    for name, values in metric_values(done).items():
        found |= _statistics(name, values)
    delays = [1e3 * (each.sent_s - each.due_s) for each in records]
    return found | {"mean_send_delay_ms": _mean(delays), "max_send_delay_ms": max(delays, default=None)}


def span_s(records: Sequence[Record]) -> float:
    """From the first request sent to the last one's end."""
    first = min((each.sent_s for each in records), default=0.0)
    return max((each.end_s for each in records), default=0.0) - first


def metric_values(done: Sequence[Record]) -> dict[str, list[float]]:
    """Seconds, by the names in METRICS."""
    return {
        "ttft": [each.ttft_s for each in done],
        "tpot": [each.tpot_s for each in done if each.tpot_s is not None],
        "itl": list(itertools.chain.from_iterable(each.tbt_s for each in done)),
        "e2el": [each.e2e_s for each in done],
    }


def per_request(records: Sequence[Record]) -> dict[str, list[Any]]:
    """vLLM's detailed lists in order, seconds; of a failed request what there is of it."""
    return {
        "input_lens": [each.num_prompt_tokens for each in records],
        "output_lens": [each.num_output_tokens if each.ok else 0 for each in records],
        "ttfts": [each.ttft_s if each.chunk_times else 0.0 for each in records],
        "itls": [each.tbt_s for each in records],
        "start_times": [each.sent_s for each in records],
        "e2els": [each.e2e_s if each.chunk_times else 0.0 for each in records],
        "cached_lens": [each.num_cached_tokens for each in records],
        "generated_texts": [each.text for each in records],
        "errors": [each.error for each in records],
    }


def _counts(records: Sequence[Record], done: Sequence[Record]) -> dict[str, Any]:
    errors = Counter(each.error for each in records if not each.ok)
    return {
        "completed": len(done),
        "failed": len(records) - len(done),
        "short_answers": sum(each.num_output_tokens < each.num_asked_tokens for each in done),
        "total_input_tokens": sum(each.num_prompt_tokens for each in done),
        "total_cached_tokens": sum(each.num_cached_tokens for each in done),
        "total_output_tokens": sum(each.num_output_tokens for each in done),
        "error_counts": dict(errors.most_common()),
        "max_concurrent_requests": _most_at_once(done),
    }


def _most_at_once(done: Sequence[Record]) -> int:
    # An end goes before a start of the same moment.
    moves = sorted([(each.sent_s, 1) for each in done] + [(each.end_s, -1) for each in done])
    return max(itertools.accumulate((move for _, move in moves), initial=0))


def _throughputs(done: Sequence[Record], duration_s: float, slos: Mapping[str, float]) -> dict[str, Any]:
    num_input = sum(each.num_prompt_tokens for each in done)
    num_output = sum(each.num_output_tokens for each in done)

    def rate(count: int) -> float:
        return count / duration_s if duration_s > 0 else 0.0

    return {
        "duration": duration_s,
        "request_throughput": rate(len(done)),
        "request_goodput": rate(sum(is_good(each, slos) for each in done)) if slos else None,
        "input_throughput": rate(num_input),
        "output_throughput": rate(num_output),
        "total_token_throughput": rate(num_input + num_output),
        "max_output_tokens_per_s": _most_in_a_second(done),
    }


def _most_in_a_second(done: Sequence[Record]) -> float:
    seconds = Counter(int(time) for each in done for time in each.token_times)
    return float(max(seconds.values(), default=0))


def is_good(one: Record, slos: Mapping[str, float]) -> bool:
    """Within all limits in ms; an answer of one token has a TPOT of 0, as in vLLM."""
    values = {"ttft": one.ttft_s, "tpot": one.tpot_s or 0.0, "e2el": one.e2e_s}
    return one.ok and all(1e3 * values[name] <= limit for name, limit in slos.items())


def _statistics(name: str, seconds: Sequence[float]) -> dict[str, float | None]:
    values = 1e3 * np.array(seconds)
    if not len(values):
        return dict.fromkeys(_statistics(name, [0.0]))
    return {
        f"mean_{name}_ms": float(values.mean()),
        f"median_{name}_ms": float(np.median(values)),
        f"std_{name}_ms": float(values.std()),
        **{f"p{p}_{name}_ms": float(np.percentile(values, p)) for p in PERCENTILES},
        f"max_{name}_ms": float(values.max()),
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def parse_slos(texts: Sequence[str]) -> dict[str, float]:
    """Goodput limits such as ttft:2000 tpot:100, in ms. Raises ValueError."""
    return dict(parse_limit(text, GOODPUT_METRICS) for text in texts)


def parse_limit(text: str, names: Sequence[str]) -> tuple[str, float]:
    """NAME:MS. Raises ValueError."""
    name, _, value = text.strip().partition(":")
    try:
        limit = float(value)
    except ValueError:
        limit = -1.0
    if name not in names or not 0 < limit < float("inf"):
        raise ValueError(f"limit {text!r} must be NAME:MS, MS above 0; names are {', '.join(names)}")
    return name, limit
