"""One prompt's CSA on one rank, and one head chunk of a layer: what selection, exchange and attention share.

Knows the plan and the wire; does nothing with them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megatron_sps2.attention.csa_plan import CsaPlan
from megatron_sps2.attention.csa_tally import CsaTally
from megatron_sps2.attention.spans import Spans
from megatron_sps2.ops.kernel_set import TORCH, Kernels
from megatron_sps2.parallel.collectives import Handle, Wire


@dataclass(frozen=True, slots=True, kw_only=True)
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
    # Told (layer, KV heads, reader, kept [n_kv, m, G]) of every selection here, for measuring.
    observe: Callable[[int, range, int, Tensor], None] | None = None

    @property
    def rank(self) -> int:
        return self.wire.axis.rank

    @property
    def spans(self) -> Spans:
        return self.tally.spans

    @property
    def ranks(self) -> range:
        return range(self.wire.axis.size)


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

    def offset(self, segment: int) -> int:
        """Where a segment of this rank begins in its rows: those before it are whole."""
        return self.run.plan.num_past(self.run.rank, segment) * self.run.plan.setting.segment_size

    def wait(self, handle: Handle[list[list[Tensor]]]) -> list[list[Tensor]]:
        """What came, by rank; the time is booked as exchange."""
        with self.run.spans("exchange"):
            return handle.wait()
