"""A prompt's attention to itself, exact, by CSA or by the paper's variant, on one rank.

Computes what P ranks would compute and counts what they would send. Knows a model's shape, no texts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from megatron_sps2.attention.csa import CsaRun, csa
from megatron_sps2.attention.csa_plan import CsaPlan
from megatron_sps2.attention.csa_tally import CsaReport, CsaTally, add_up
from megatron_sps2.attention.dilated import dilated_bytes
from megatron_sps2.attention.strategy import csa_strategy, wants_csa
from megatron_sps2.config import AttentionConfig, ModelConfig, ParallelConfig
from megatron_sps2.csa_setting import CsaSetting
from megatron_sps2.engine.csa_bytes import VirtualRanks
from megatron_sps2.engine.trial import ExactStep
from megatron_sps2.ops.dilated import dilated_attention, dilated_pairs, paper_levels
from megatron_sps2.parallel.collectives import Wire
from megatron_sps2.parallel.groups import world_axis
from megatron_sps2.parallel.layout import contiguous
from megatron_sps2.parallel.ledger import Ledger
from megatron_sps2.parallel.traffic import Traffic


@dataclass(frozen=True, slots=True)
class Cost:
    """Of one prompt: bytes beside pass_kv's, and shares of the probes' attention and of far keys kept."""

    bytes_ratio: float
    kept_mass: float | None  # None where nothing probes
    density: float


def csa_run(
    setting: CsaSetting,
    num_tokens: int,
    model: ModelConfig,
    observe: Callable[[int, range, int, Tensor], None] | None = None,
) -> CsaRun:
    """For one prompt in a world of one rank."""
    return CsaRun(
        plan=CsaPlan(setting, num_tokens, 1),
        wire=Wire(world_axis(), Ledger()),
        scale=model.softmax_scale,
        overlap=False,
        tally=CsaTally(model.num_layers, model.num_query_groups),
        observe=observe,
    )


class Prefill(Protocol):
    """One prompt's attention to itself; layers come one after the other."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [s, 1, n, d], k and v [s, 1, n_kv, d] -> [s, 1, n, d]"""
        ...

    def cost(self) -> Cost:
        """Once all layers have run."""
        ...


class ExactPrefill(ExactStep):
    """Causal attention to everything."""

    def cost(self) -> Cost:
        return Cost(1.0, 1.0, 1.0)


class CsaPrefill:
    """CSA on one rank, which computes what any number of ranks computes."""

    def __init__(
        self, setting: CsaSetting, num_tokens: int, sp_size: int, model: ModelConfig, element_size: int
    ) -> None:
        self._model, self._setting = model, setting
        self._ranks = VirtualRanks(
            setting=setting, num_tokens=num_tokens, num_ranks=sp_size, model=model, element_size=element_size
        )
        self._run = csa_run(setting, num_tokens, model, self._ranks.observe)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return csa(q, k, v, self._run, layer)

    def report(self) -> CsaReport:
        """Its bytes are this rank's: none."""
        return add_up(
            self._run.tally.encode()[None],
            tp_size=1,
            num_layers=self._model.num_layers,
            setting=self._setting.name,
            bytes_exact=0,
            bytes_formula=lambda keys_sent: 0,
        )

    def bytes_per_rank_per_layer(self) -> list[float]:
        return self._ranks.bytes_per_rank_per_layer()

    def cost(self) -> Cost:
        report = self.report()
        return Cost(self._ranks.ratio_to_pass_kv(), report.kept_mass, report.density)


class PaperPrefill:
    """The paper's own variant: segments are the ranks, and bytes and pairs follow from lengths."""

    def __init__(
        self, setting: CsaSetting, num_tokens: int, sp_size: int, model: ModelConfig, element_size: int
    ) -> None:
        self._model, self._element_size = model, element_size
        self._layout = contiguous(num_tokens, sp_size)
        self._groups, self._degrees = setting.levels_for(sp_size) or paper_levels(sp_size)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return dilated_attention(
            *(q, k, v),
            boundaries=[0, *(held[0].stop for held in self._layout.segments)],
            group_sizes=self._groups,
            degrees=self._degrees,
            scale=self._model.softmax_scale,
        )

    def bytes_per_rank_per_layer(self) -> list[float]:
        return [sum(self._bytes(rank).values()) for rank in range(self._layout.num_ranks)]

    def cost(self) -> Cost:
        layout, num_ranks = self._layout, self._layout.num_ranks
        parallel = ParallelConfig(sp_size=num_ranks)
        traffic = Traffic(model=self._model, parallel=parallel, element_size=self._element_size)
        exact = num_ranks * traffic.pass_kv(layout.num_tokens)
        pairs = [
            dilated_pairs(layout.tokens_per_rank, self._groups, self._degrees, head)
            for head in range(self._model.num_query_groups)
        ]
        kept, far = (sum(counts) for counts in zip(*pairs, strict=True))
        sent = sum(self.bytes_per_rank_per_layer())
        return Cost(sent / exact if exact else 0.0, None, kept / far if far else 1.0)

    def _bytes(self, rank: int) -> dict[str, int]:
        return dilated_bytes(
            self._layout,
            rank,
            num_heads=self._model.num_attention_heads,
            num_kv_heads=self._model.num_query_groups,
            head_dim=self._model.head_dim,
            element_size=self._element_size,
            group_sizes=self._groups,
            degrees=self._degrees,
        )


def make_prefill(
    setting: CsaSetting | None, num_tokens: int, sp_size: int, model: ModelConfig, element_size: int = 4
) -> Prefill:
    """For one prompt; None is exact, and so is a prompt of one segment, as in the engine."""
    if setting is None or not wants_csa("csa", AttentionConfig(), setting, num_tokens, 0):
        return ExactPrefill()
    kind = PaperPrefill if csa_strategy(setting) == "dilated" else CsaPrefill
    return kind(setting, num_tokens, sp_size, model, element_size)
