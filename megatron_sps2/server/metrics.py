"""What /metrics tells: vLLM's names with the prefix sps2:, and what belongs to ranks; recent times too.

Knows the protocol's messages, no HTTP.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from megatron_sps2.server.protocol import Beat, Delta, EngineStats, Ready, StepRecord

if TYPE_CHECKING:
    from megatron_sps2.server.engine_client import Stream

# Seconds, for prompts of up to a million tokens; and between two tokens.
LONG_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160, 320, 640, 1280)
SHORT_S = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10, 40)
TOKENS = tuple(4**k for k in range(11))
SHARES = (0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
RECENT_S, RECENT_SAMPLES = 60.0, 2000
STEPS_S = 15.0
# Of an engine: counters by the field of EngineStats that holds them.
ENGINE_COUNTERS = {
    "engine_steps": ("num_steps", "Steps that ran layers"),
    "num_preemptions": ("num_preemptions", "Requests that were sent back to make room"),
    "prefill_pauses": ("num_pauses", "Times a prefill paused between two layers for something else"),
    "prefix_cache_queries": ("prefix_queries", "Prompt tokens looked up in the prefix cache"),
    "prefix_cache_hits": ("prefix_hits", "Prompt tokens found in the prefix cache"),
}


class Recent:
    """The newest values of something, with their times."""

    def __init__(self) -> None:
        self._values: deque[tuple[float, float]] = deque(maxlen=RECENT_SAMPLES)

    def add(self, value: float) -> None:
        self._values.append((time.monotonic(), value))

    def within(self, seconds: float) -> list[float]:
        start = time.monotonic() - seconds
        return [value for at, value in self._values if at >= start]


class Metrics:
    """Counts what passes, and keeps the newest state of ranks and engines for the next scrape."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model = model_name
        self._beats: dict[int, tuple[float, Beat]] = {}
        self._stats: dict[int, EngineStats] = {}
        self._ready: dict[int, Ready] = {}
        self.ttft_s, self.tbt_s = Recent(), Recent()
        self.prompt_tokens, self.generated_tokens, self._e2e_s = Recent(), Recent(), Recent()
        self._last_token: dict[str, float] = {}
        self.steps: deque[tuple[int, StepRecord]] = deque(maxlen=20000)
        self._make()
        self.registry.register(self)  # collect() is all it needs

    def _make(self) -> None:
        def histogram(name: str, says: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"sps2:{name}", says, ["model_name"], buckets=buckets, registry=self.registry)
            return made.labels(self._model)

        def counter(name: str, says: str, *labels: str) -> Counter:
            return Counter(f"sps2:{name}", says, ["model_name", *labels], registry=self.registry)

        self._ttft = histogram("time_to_first_token_seconds", "From arrival to the first token", LONG_S)
        self._tbt = histogram("inter_token_latency_seconds", "Between two tokens of an answer", SHORT_S)
        self._e2e = histogram("e2e_request_latency_seconds", "From arrival to the last token", LONG_S)
        self._queue = histogram("request_queue_time_seconds", "From arrival to the first layer", LONG_S)
        self._prefill = histogram("request_prefill_time_seconds", "From first layer to first token", LONG_S)
        self._prompt = histogram("request_prompt_tokens", "Tokens of a prompt", TOKENS)
        self._answer = histogram("request_generation_tokens", "Tokens of an answer", TOKENS)
        self._density = histogram("csa_density", "Share of far keys that CSA kept", SHARES)
        self._mass = histogram("csa_kept_mass", "Share of the probes' attention that CSA kept", SHARES)
        self._num_prompt = counter("prompt_tokens", "Prompt tokens of requests with a first token")
        self._num_generated = counter("generation_tokens", "Tokens generated")
        self._success = counter("request_success", "Requests that ended", "finished_reason")
        self._restarts = Counter(
            "sps2:engine_restarts",
            "Times that another engine took a lost one's place",
            registry=self.registry,
        )
        self._http = Counter("sps2:http_requests", "HTTP answers", ["route", "code"], registry=self.registry)
        self._refused = Counter(
            "sps2:requests_refused", "Requests turned away", ["reason"], registry=self.registry
        )

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    @property
    def seconds_per_request(self) -> float:
        """About how often a request has ended lately."""
        ended = len(self._e2e_s.within(RECENT_S))
        return RECENT_S / ended if ended else 1.0

    def http(self, route: str, code: int) -> None:
        self._http.labels(route, str(code)).inc()

    def refused(self, reason: str) -> None:
        self._refused.labels(reason).inc()

    def beat(self, beat: Beat) -> None:
        self._beats[beat.rank] = time.monotonic(), beat
        self.steps.extend((beat.rank, step) for step in beat.steps)

    def restarted(self) -> None:
        """What follows is of another engine."""
        self._restarts.inc()
        for forgotten in (self._beats, self._stats, self._ready):
            forgotten.clear()

    def stats(self, stats: EngineStats, ready: Ready | None) -> None:
        self._stats[stats.replica] = stats
        if ready:
            self._ready[stats.replica] = ready

    def delta(self, delta: Delta, stream: Stream) -> None:
        """News of a request, after the stream has counted its tokens."""
        now = time.monotonic()
        if delta.tokens:
            self._count_tokens(delta, stream, now)
        if delta.csa:
            self._density.observe(delta.csa["density"])
            if delta.csa["kept_mass"] is not None:
                self._mass.observe(delta.csa["kept_mass"])
        if delta.finish_reason:
            self._last_token.pop(delta.request_id, None)
            self._count_end(delta, stream, now)

    def ended(self, stream: Stream, reason: str) -> None:
        """A request that the front end itself has ended."""
        self._last_token.pop(stream.request_id, None)
        self._success.labels(self._model, reason).inc()

    def _count_tokens(self, delta: Delta, stream: Stream, now: float) -> None:
        before = self._last_token.get(delta.request_id)
        if before is None:
            ttft = now - stream.submitted_at
            self._ttft.observe(ttft)
            self.ttft_s.add(ttft)
            self._num_prompt.labels(self._model).inc(stream.num_prompt_tokens)
            self._prompt.observe(stream.num_prompt_tokens)
            self.prompt_tokens.add(stream.num_prompt_tokens)
        else:
            self._tbt.observe(now - before)
            self.tbt_s.add(now - before)
        self._last_token[delta.request_id] = now
        self._num_generated.labels(self._model).inc(len(delta.tokens))
        self.generated_tokens.add(len(delta.tokens))

    def _count_end(self, delta: Delta, stream: Stream, now: float) -> None:
        self._success.labels(self._model, delta.finish_reason).inc()
        self._answer.observe(stream.num_generated)
        self._e2e.observe(now - stream.submitted_at)
        self._e2e_s.add(now - stream.submitted_at)
        if delta.timings:
            self._queue.observe(delta.timings.queue_ms / 1e3)
            self._prefill.observe(delta.timings.prefill_ms / 1e3)

    def collect(self) -> Iterator[Metric]:
        """State of engines and ranks, as prometheus_client asks for it."""
        yield from self._collect_engines()
        yield from self._collect_ranks()

    def _collect_engines(self) -> Iterator[Metric]:
        every = self._stats.values()
        capacity = sum(
            ready.num_blocks * len(self._stats[r].num_free_blocks) for r, ready in self._ready.items()
        )
        free = sum(sum(self._stats[replica].num_free_blocks) for replica in self._ready)
        gauges = {
            "num_requests_running": (
                sum(s.num_running + s.num_prefilling for s in every),
                "Requests in the batch",
            ),
            "num_requests_waiting": (sum(s.num_waiting + s.num_swapped for s in every), "Requests that wait"),
            "num_requests_prefilling": (sum(s.num_prefilling for s in every), "Prefills that have begun"),
            "num_requests_swapped": (sum(s.num_swapped for s in every), "Requests in host memory"),
            "num_prefills_paused": (sum(s.num_paused for s in every), "Prefills paused between two layers"),
            "kv_cache_usage_perc": (
                1 - free / capacity if capacity else 0.0,
                "Share of KV blocks in use, 0..1",
            ),
        }
        for name, (value, says) in gauges.items():
            gauge = GaugeMetricFamily(f"sps2:{name}", says, labels=["model_name"])
            gauge.add_metric([self._model], value)
            yield gauge
        for name, (attribute, says) in ENGINE_COUNTERS.items():
            counter = CounterMetricFamily(f"sps2:{name}", says, labels=["model_name"])
            counter.add_metric([self._model], sum(getattr(s, attribute) for s in every))
            yield counter

    def _collect_ranks(self) -> Iterator[Metric]:
        now = time.monotonic()
        says = {
            "rank_up": "1 where the rank has been heard lately",
            "rank_beat_age_seconds": "Since the rank's last heartbeat",
            "kv_blocks_used": "KV blocks that requests hold on the rank",
            "kv_blocks_total": "KV blocks of the rank",
            "kv_blocks_leaked": "KV blocks held for no request, as of the last time nothing ran",
            "process_resident_memory_bytes": "Memory of the rank's process",
            "process_peak_memory_bytes": "The most memory that the rank's process has held",
        }
        gauges = {
            name: GaugeMetricFamily(f"sps2:{name}", text, labels=["rank"]) for name, text in says.items()
        }
        sent = CounterMetricFamily(
            "sps2:bytes_sent", "Bytes sent to other ranks", labels=["rank", "collective"]
        )
        for rank, (seen_at, beat) in sorted(self._beats.items()):
            ready = self._ready.get(beat.replica)
            values = {
                "rank_up": float(now - seen_at < 5),
                "rank_beat_age_seconds": now - seen_at,
                "kv_blocks_used": beat.num_used_blocks,
                "kv_blocks_total": ready.num_blocks if ready else 0,
                "kv_blocks_leaked": self._leaked(beat, ready),
                "process_resident_memory_bytes": beat.rss_bytes,
                "process_peak_memory_bytes": beat.peak_bytes,
            }
            for name, value in values.items():
                gauges[name].add_metric([str(rank)], value)
            for collective, count in beat.bytes_sent.items():
                sent.add_metric([str(rank), collective], count)
        yield from gauges.values()
        yield sent

    def _leaked(self, beat: Beat, ready: Ready | None) -> int:
        stats = self._stats.get(beat.replica)
        if ready is None or stats is None or stats.num_leaked_blocks is None:
            return 0
        return stats.num_leaked_blocks[ready.ranks.index(beat.rank)]
