"""Which strategy serves a request's tokens, and on which ranks they lie, before any block is given.

Plain integers; the same for every policy. Knows no queue and no free list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sps2.attention.strategy import LOCAL, choose_strategy, csa_strategy, lay_out, wants_csa
from megatron_sps2.config import AttentionConfig, ModelConfig, ParallelConfig
from megatron_sps2.csa_setting import CsaSetting
from megatron_sps2.engine.request import Request
from megatron_sps2.parallel.layout import TokenLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """The model's shape, the grid and the attention that were asked for -> strategies and layouts."""

    model: ModelConfig
    parallel: ParallelConfig
    attention: AttentionConfig
    csa: CsaSetting | None
    unit: int  # tokens that stay together on a rank, so that a full block can be found by others

    @property
    def sp_size(self) -> int:
        return self.parallel.sp_size

    @property
    def takes_context(self) -> bool:
        """Whether exact prompts can follow what is cached: a prefix, or their own first chunks."""
        return self.attention.strategy in ("auto", "pass_q")

    def wants_csa(self, request: Request) -> bool:
        """By the prompt alone: an answer that is computed again does not change how its prompt attends."""
        return self.csa is not None and wants_csa(
            request.attention, self.attention, self.csa, len(request.prompt_ids), request.num_past
        )

    def may_share(self, request: Request) -> bool:
        """Whether the prompt may begin with other requests' blocks: exact, from its first token on."""
        if request.num_past or request.params.prompt_logprobs is not None:
            return False
        return self.takes_context and not self.wants_csa(request)

    def strategy(self, request: Request, start: int) -> str:
        """Of the tokens from `start` on."""
        if request.home is not None:
            return LOCAL
        if self.csa is not None and self.wants_csa(request):
            return csa_strategy(self.csa)
        return self.exact_strategy(start)

    def exact_strategy(self, num_past: int) -> str:
        """Raises ValueError where the strategy that was asked for cannot run."""
        return choose_strategy(
            self.attention.strategy,
            num_heads=self.model.num_attention_heads // self.parallel.tp_size,
            num_kv_heads=self.model.num_query_groups // self.parallel.tp_size,
            sp_size=self.sp_size,
            num_past=num_past,
        )

    def layout(self, request: Request, start: int, stop: int, turn: int = 0) -> TokenLayout:
        return lay_out(
            self.strategy(request, start),
            stop - start,
            self.sp_size,
            self.csa,
            unit=self.unit,
            home=request.home,
            turn=turn,
        )

    def best_turn(self, request: Request, start: int, stop: int, held: Sequence[int]) -> int:
        """By how many ranks to turn the layout, so that shards of `held` tokens stay as level as can be."""
        if not start or request.home is not None:
            return 0
        new = self.layout(request, start, stop).tokens_per_rank

        def fullest(turn: int) -> int:
            return max(held[(rank + turn) % self.sp_size] + more for rank, more in enumerate(new))

        return min(range(self.sp_size), key=fullest)
