"""One prompt's CSA on one rank, and one head chunk of a layer: what selection, exchange and attention share.

Knows the plan and the wire; does nothing with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from torch import Tensor

from megatron_sps2.attention.csa_budget import budgets, rule_kind
from megatron_sps2.attention.csa_plan import CsaPlan
from megatron_sps2.attention.csa_routes import CsaRoutes
from megatron_sps2.attention.csa_tally import CsaTally
from megatron_sps2.attention.spans import Spans
from megatron_sps2.ops.keep_rule import KeepRule
from megatron_sps2.ops.kernel_set import TORCH, Kernels
from megatron_sps2.parallel.collectives import Handle, Wire

T = TypeVar("T")

# Told (layer, KV heads, reader, kept [n_kv, m, G]) of every selection on a rank.
Observe = Callable[[int, range, int, Tensor], None]


@dataclass(frozen=True, kw_only=True)
class CsaRun:
    """One prompt's CSA on one rank; layers come one after the other."""

    plan: CsaPlan
    wire: Wire
    scale: float
    # True: a head chunk at a time, the next one under way meanwhile. False: all heads at once, same result.
    overlap: bool
    tally: CsaTally
    kernels: Kernels = TORCH
    # Of this tp rank, in the whole model: budgets and strides belong to heads of the model.
    first_kv_head: int = 0
    observe: Observe | None = None  # for measuring

    @property
    def rank(self) -> int:
        return self.wire.axis.rank

    @property
    def spans(self) -> Spans:
        return self.tally.spans

    @property
    def ranks(self) -> range:
        return range(self.wire.axis.size)

    @cached_property
    def routes(self) -> CsaRoutes:
        return CsaRoutes(self.plan, self.rank, self.tally.device)

    @cached_property
    def _budgets(self) -> Tensor:
        """float64 [layers, n_kv, levels or 1]; made at once, for a layer must not wait for a copy."""
        heads = range(self.first_kv_head, self.first_kv_head + self.tally.num_kv_heads)
        return budgets(self.plan.setting, self.tally.num_layers, heads).to(self.tally.device)

    def rule(self, layer: int, heads: range) -> KeepRule:
        """For some KV heads, counted in this tp rank."""
        setting = self.plan.setting
        return KeepRule(
            kind=rule_kind(setting),
            num_sinks=setting.num_sinks,
            window=setting.window,
            budgets=self._budgets[layer, heads.start : heads.stop],
            first_head=self.first_kv_head + heads.start,
        )


@dataclass(frozen=True, slots=True)
class HeadChunk:
    """Some KV heads of one layer and the query heads that read them, on this rank's tokens."""

    run: CsaRun
    layer: int
    heads: range  # KV heads, counted in this tp rank
    q: Tensor  # [s/P, n, d]
    k: Tensor  # [n_kv, s/P, d]
    v: Tensor

    @classmethod
    def cut(cls, run: CsaRun, layer: int, heads: range, q: Tensor, k: Tensor, v: Tensor) -> HeadChunk:
        """q [s/P, 1, n, d], k and v [s/P, 1, n_kv, d] of all heads."""
        group = q.shape[2] // k.shape[2]
        queries = q[:, 0, heads.start * group : heads.stop * group]
        keys, values = (x[:, 0, heads.start : heads.stop].transpose(0, 1).contiguous() for x in (k, v))
        return cls(run, layer, heads, queries, keys, values)

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.q.shape[1] // len(self.heads)

    @property
    def queries(self) -> slice:
        """Its query heads among all of this tp rank."""
        return slice(self.heads.start * self.group, self.heads.stop * self.group)

    def wait(self, handle: Handle[T]) -> T:
        """What came; the time is booked as exchange."""
        with self.run.spans("exchange"):
            return handle.wait()
