"""The ranks' tallies of one prompt -> the report that comes with its answer. Knows formulas, no wires."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from megatron_sps2.attention.csa_plan import CsaPlan
from megatron_sps2.attention.csa_tally import CsaReport, add_up
from megatron_sps2.attention.dilated import dilated_bytes
from megatron_sps2.csa_setting import CsaSetting
from megatron_sps2.engine.request import Request
from megatron_sps2.ops.dilated import paper_levels
from megatron_sps2.parallel.layout import contiguous
from megatron_sps2.parallel.traffic import Traffic


@dataclass(frozen=True, slots=True, kw_only=True)
class CsaReporter:
    """`exact_strategy` names the one that would have served the prompt exactly."""

    setting: CsaSetting | None
    traffic: Traffic
    exact_strategy: Callable[[Request], str]

    def report(self, request: Request, tallies: Tensor) -> CsaReport:
        """tallies [sp_size * tp_size, entries], tp innermost."""
        assert self.setting is not None, "a tally without CSA"
        setting = self.setting
        parallel, num_layers = self.traffic.parallel, self.traffic.model.num_layers
        num_tokens, num_ranks = len(request.prompt_ids), parallel.sp_size * parallel.tp_size
        exact = getattr(self.traffic, self.exact_strategy(request))(num_tokens)
        return add_up(
            tallies,
            tp_size=parallel.tp_size,
            num_layers=num_layers,
            setting=setting.name,
            bytes_exact=round(exact * num_layers * num_ranks),
            bytes_formula=lambda keys_sent: self._bytes(setting, num_tokens, keys_sent),
        )

    def _bytes(self, setting: CsaSetting, num_tokens: int, keys_sent: int) -> int:
        """Of all ranks and layers."""
        model, parallel = self.traffic.model, self.traffic.parallel
        element_size, ranks = self.traffic.element_size, range(parallel.sp_size)
        heads = {
            "num_heads": model.num_attention_heads // parallel.tp_size,
            "num_kv_heads": model.num_query_groups // parallel.tp_size,
            "head_dim": model.head_dim,
            "element_size": element_size,
        }
        if setting.selector == "dilated":
            return model.num_layers * sum(
                sum(self._dilated(setting, num_tokens, rank, heads, tp_rank).values())
                for rank in ranks
                for tp_rank in range(parallel.tp_size)
            )
        plan = CsaPlan(setting, num_tokens, parallel.sp_size)
        messages = sum(sum(plan.message_bytes(rank, **heads).values()) for rank in ranks)
        return messages * parallel.tp_size * model.num_layers + 2 * model.head_dim * element_size * keys_sent

    def _dilated(
        self, setting: CsaSetting, num_tokens: int, rank: int, heads: dict[str, int], tp_rank: int
    ) -> dict[str, int]:
        num_ranks = self.traffic.parallel.sp_size
        groups, degrees = setting.levels_for(num_ranks) or paper_levels(num_ranks)
        return dilated_bytes(
            contiguous(num_tokens, num_ranks),
            rank,
            **heads,
            group_sizes=groups,
            degrees=degrees,
            first_kv_head=tp_rank * heads["num_kv_heads"],
        )
