"""The module in Megatron's core_attention slot: hands Q, K, V to the attention of the current step.

What the step is (a prefill by some strategy, a decode batch) is set by the runner; a layer never knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_sps2.attention.csa import CsaRun, csa
from megatron_sps2.attention.csa_plan import CsaPlan
from megatron_sps2.attention.csa_tally import CsaTally
from megatron_sps2.attention.dilated import dilated
from megatron_sps2.attention.kv_cache import KVCache
from megatron_sps2.attention.prefill import STRATEGIES, PrefillShape
from megatron_sps2.attention.rotations import RotationOf, no_rotation
from megatron_sps2.attention.strategy import lay_out
from megatron_sps2.attention.window import NO_WINDOWS, WindowPlan, Windows
from megatron_sps2.csa_setting import CsaSetting
from megatron_sps2.ops.dilated import dilated_pairs, paper_levels
from megatron_sps2.ops.kernel_set import TORCH, Kernels
from megatron_sps2.ops.paged import SlotRun, Slots
from megatron_sps2.parallel.collectives import Wire
from megatron_sps2.parallel.layout import TokenLayout


class AttentionStep(Protocol):
    """One engine step as core attention sees it."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [s/P, b, n/T, d], k and v [s/P, b, n_kv/T, d] -> [s/P, b, n/T, d]; layers count from 0.

        Roped, unless the step's kernels do that.
        """
        ...


@dataclass(slots=True)
class StepContext:
    """The step that is running now; one per engine, bound into every layer when the model is built."""

    step: AttentionStep | None = None


class SequenceParallelAttention(torch.nn.Module):
    """Megatron's core attention, sequence-parallel; bind `context` by functools.partial."""

    def __init__(self, *, context: StepContext, layer_number: int, **_: Any) -> None:
        super().__init__()
        self._context = context
        self._layer = layer_number - 1

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None = None, **_: Any
    ) -> Tensor:
        """query [s/P, b, n/T, d], key and value [s/P, b, n_kv/T, d] -> [s/P, b, n/T * d]"""
        step = self._context.step
        assert step is not None, "a layer ran outside of an engine step"
        assert attention_mask is None, "the causal mask is implied; attention_mask must be None"
        return step.attend(self._layer, query, key, value).flatten(2)


@dataclass(frozen=True, slots=True)
class BatchStep:
    """Several prompts, and decodes, in one step: each attends by itself to its rows of this rank."""

    parts: Sequence[AttentionStep]
    num_rows: Sequence[int]  # of each part on this rank

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [s/P, 1, n, d], k and v [s/P, 1, n_kv, d], rows of all parts one after the other."""
        rows = zip(*(x.split(list(self.num_rows)) for x in (q, k, v)), strict=True)
        return torch.cat([part.attend(layer, *x) for part, x in zip(self.parts, rows, strict=True)])


@dataclass(slots=True, kw_only=True)
class PrefillStep:
    """Attention of one prompt's prefill. Creating it makes room in the cache for this rank's tokens."""

    cache: KVCache
    wire: Wire
    request_id: int
    strategy: str
    num_tokens: int
    num_past: int
    scale: float
    overlap: bool
    # Of CSA: its setting and this tp rank's first KV head in the whole model.
    setting: CsaSetting | None = None
    first_kv_head: int = 0
    # The sp rank of a prompt that lives on one; ranks hold whole units of tokens (a KV block's size, or 1).
    home: int | None = None
    unit: int = 1
    turn: int = 0  # by how many ranks the layout is turned
    windows: Windows = NO_WINDOWS
    kernels: Kernels = TORCH
    rotation_of: RotationOf = no_rotation
    layout: TokenLayout = field(init=False)
    csa: CsaRun | None = field(init=False, default=None)
    _past: list[SlotRun] = field(init=False)
    _near: list[SlotRun] = field(init=False)  # of the past, within the window
    _new: Slots = field(init=False)
    _window: WindowPlan = field(init=False)

    def __post_init__(self) -> None:
        axis, cache = self.wire.axis, self.cache
        self.layout = lay_out(
            self.strategy,
            self.num_tokens,
            axis.size,
            self.setting,
            unit=self.unit,
            home=self.home,
            turn=self.turn,
        )
        self._past = cache.runs(self.request_id, 0, cache.num_tokens(self.request_id))
        positions = self._plan_window() if self.windows.layers else ()
        self._new = Slots(cache.extend(self.request_id, self.layout.tokens_per_rank[axis.rank], positions))
        if self.setting is not None and self.strategy in ("csa", "dilated"):
            self.csa = CsaRun(
                plan=CsaPlan(self.setting, self.num_tokens, axis.size),
                wire=self.wire,
                scale=self.scale,
                overlap=self.overlap,
                tally=CsaTally(cache.num_layers, cache.num_kv_heads, cache.device),
                first_kv_head=self.first_kv_head,
                kernels=self.kernels,
            )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [s/P, 1, n, d], k and v [s/P, 1, n_kv, d] -> [s/P, 1, n, d]; K and V stay in this shard."""
        q, k = self._keep(layer, q, k, v)
        if self.cache.is_rounded:  # else a token would depend on which keys were cached when it attended
            k, v = self.cache.read(layer, self._new.runs)
        if layer in self.windows.layers:
            return self._window.attend(q, k, v, self.cache.read(layer, self._near))
        if self.csa is not None:
            attend = csa if self.strategy == "csa" else self._attend_dilated
            return attend(q, k, v, self.csa, layer)
        shape = PrefillShape(
            layout=self.layout,
            wire=self.wire,
            scale=self.scale,
            overlap=self.overlap,
            past=self.cache.read(layer, self._past) if self.num_past else None,
            kernels=self.kernels,
        )
        return STRATEGIES[self.strategy](q, k, v, shape)

    def _keep(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Writes K and V -> q and k, turned where Megatron has not."""
        kv = self.cache.layer(layer)
        if self.kernels.append_roped is None:
            self.kernels.write_paged(kv, self._new, k[:, 0], v[:, 0])
            return q, k
        slots = self._new.tensor(self.cache.device)
        q, k = self.kernels.append_roped(q[:, 0], k[:, 0], v[:, 0], self.rotation_of(layer), kv, slots)
        return q.unsqueeze(1), k.unsqueeze(1)

    def _plan_window(self) -> list[int]:
        """Positions of this rank's new tokens."""
        self._near, positions = self.cache.runs_after(self.request_id, self.num_past - self.windows.size)
        self._window = WindowPlan(
            layout=self.layout,
            wire=self.wire,
            window=self.windows.size,
            scale=self.scale,
            start=self.num_past,
            spread=self.home is None,
            device=self.cache.device,
            past_positions=positions.to(self.cache.device),
        )
        return [self.num_past + place for place in self.layout.positions(self.wire.axis.rank)]

    def _attend_dilated(self, q: Tensor, k: Tensor, v: Tensor, run: CsaRun, layer: int) -> Tensor:
        """The paper's own variant; nothing probes, so its kept mass is not known."""
        ledger, num_ranks = self.wire.ledger, self.layout.num_ranks
        groups, degrees = run.plan.setting.levels_for(num_ranks) or paper_levels(num_ranks)
        sent = ledger.total_sent
        with run.spans("far"):  # near and far at once, exchange included
            out = dilated(
                *(q, k, v),
                layout=self.layout,
                wire=self.wire,
                scale=self.scale,
                group_sizes=groups,
                degrees=degrees,
                first_kv_head=self.first_kv_head,
                overlap=self.overlap,
            )
        run.tally.bytes_sent += ledger.total_sent - sent
        lengths = self.layout.tokens_per_rank
        for head in range(k.shape[2]):
            kept, far = dilated_pairs(lengths, groups, degrees, self.first_kv_head + head)
            run.tally.read(layer, range(head, head + 1), kept=kept, far=far)
        return out
