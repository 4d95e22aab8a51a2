"""Work and a device's profile -> seconds. What overlaps is said by the profile; all else adds up."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sps2.engine.plan import StepPlan
from megatron_sps2.simulator.counter import Counter
from megatron_sps2.simulator.profile import DeviceProfile
from megatron_sps2.simulator.work import Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Where a step's seconds go; `exchange` is what attention does not hide."""

    overhead: float
    matmul: float
    attention: float
    exchange: float
    kv: float
    sent: float

    @property
    def total(self) -> float:
        return self.overhead + self.matmul + self.attention + self.exchange + self.kv + self.sent


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Prices plans of one model on one grid of one kind of device."""

    profile: DeviceProfile
    counter: Counter

    def __post_init__(self) -> None:
        self.profile.check_dtype(self.counter.dtype)
        self.profile.check_parallel(self.counter.parallel)

    def seconds(self, plan: StepPlan, num_ended: int | None = None) -> float:
        return self.price(self.counter.work(plan, num_ended)).total

    def price(self, work: Work) -> Parts:
        profile, dtype = self.profile, self.counter.dtype
        matmul = work.matmul_flops / profile.matmul_flops[dtype]
        weights = work.weight_bytes / profile.weight_bandwidth
        attention = work.attention_flops / profile.attention_flops[dtype]
        exchange = self._wire(work.exchange_intra_bytes, work.exchange_inter_bytes)
        return Parts(
            overhead=self._overhead(work),
            matmul=_overlapped(matmul, weights, profile.memory_overlap),
            attention=attention,
            exchange=_overlapped(attention, exchange, profile.exchange_overlap) - attention,
            kv=work.kv_bytes / profile.kv_bandwidth,
            sent=self._wire(work.sent_intra_bytes, work.sent_inter_bytes),
        )

    def _wire(self, inside: float, outside: float) -> float:
        """Two links at the same time."""
        return max(inside / self.profile.intra.bandwidth, outside / self.profile.inter.bandwidth)

    def _overhead(self, work: Work) -> float:
        over, profile = self.profile.overheads, self.profile
        return (
            work.steps * over.step_s
            + work.layers * over.layer_s
            + work.piece_layers * over.piece_layer_s
            + work.row_layers * over.row_layer_s
            + work.samples * over.sample_s
            + work.intra_rounds * profile.intra.latency_s
            + work.inter_rounds * profile.inter.latency_s
        )


def _overlapped(one: float, other: float, share: float) -> float:
    """The longer, and what of the shorter does not hide behind it."""
    return max(one, other) + (1 - share) * min(one, other)
