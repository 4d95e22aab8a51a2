"""What P ranks would send for a prompt's CSA, counted from the keys that one rank alone kept.

CSA keeps the same keys on any number of ranks; only who holds them differs. Sends nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from megatron_sps2.attention.csa_plan import CsaPlan
from megatron_sps2.config import ModelConfig, ParallelConfig
from megatron_sps2.csa_setting import CsaSetting
from megatron_sps2.parallel.traffic import Traffic


@dataclass(frozen=True, kw_only=True)
class VirtualRanks:
    """Give `observe` to the CsaRun of a run over one rank; tp is 1.

    Raises ValueError for the paper's own variant, whose segments are the ranks: see `dilated_bytes`.
    """

    setting: CsaSetting
    num_tokens: int
    num_ranks: int
    model: ModelConfig
    element_size: int
    # By layer: what any of a rank's readers keeps, bool [P, n_kv, segments, G].
    _wanted: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.setting.selector == "dilated":
            raise ValueError(
                f"CSA setting {self.setting.name!r} selects nothing, its bytes follow from lengths; "
                "use attention.dilated.dilated_bytes"
            )

    @cached_property
    def plan(self) -> CsaPlan:
        return CsaPlan(self.setting, self.num_tokens, self.num_ranks)

    def observe(self, layer: int, heads: range, reader: int, kept: Tensor) -> None:
        """kept bool [n_kv, m, G]: what the reader keeps of all m segments before it."""
        assert kept.shape[1] == reader, "this needs the selections of a run over one rank"
        if layer not in self._wanted:
            sizes = self.model.num_query_groups, len(self.plan.segments), self.plan.setting.segment_size
            self._wanted[layer] = torch.zeros(self.num_ranks, *sizes, dtype=torch.bool)
        owner = self.plan.owner[reader]
        self._wanted[layer][owner, heads.start : heads.stop, :reader] |= kept.cpu()

    def keys_sent(self, rank: int) -> int:
        """Over all layers and KV heads; a key counts once for each rank that it is sent to."""
        others = [other for other in range(self.num_ranks) if other != rank]
        held = self.plan.held[rank]
        return sum(int(wanted[others][:, :, held].sum()) for wanted in self._wanted.values())

    def bytes_per_rank_per_layer(self) -> list[float]:
        """Of each rank, the mean over layers: keys, values and CSA's other messages."""
        key_bytes = 2 * self.model.head_dim * self.element_size
        return [
            self._message_bytes(rank) + self.keys_sent(rank) * key_bytes / self.model.num_layers
            for rank in range(self.num_ranks)
        ]

    def mean_bytes_per_rank_per_layer(self) -> float:
        return sum(self.bytes_per_rank_per_layer()) / self.num_ranks

    def ratio_to_pass_kv(self) -> float:
        """Of all ranks together: what exact attention would send by pass_kv is 1; 0 on one rank."""
        parallel = ParallelConfig(sp_size=self.num_ranks)
        traffic = Traffic(model=self.model, parallel=parallel, element_size=self.element_size)
        exact = traffic.pass_kv(self.num_tokens)
        return self.mean_bytes_per_rank_per_layer() / exact if exact else 0.0

    def _message_bytes(self, rank: int) -> int:
        """Of one layer, beside the kept keys and values."""
        found = self.plan.message_bytes(
            rank,
            num_heads=self.model.num_attention_heads,
            num_kv_heads=self.model.num_query_groups,
            head_dim=self.model.head_dim,
            element_size=self.element_size,
        )
        return sum(found.values())
