"""A mixture of experts: Megatron's router and experts around the tokens that this rank holds.

Every rank holds all experts, each cut over tp as a dense MLP is, so that no token travels: Megatron's
dispatchers, which move tokens to experts, are not used. Knows no sequence: each token is routed by itself.
"""

from __future__ import annotations

import megatron_sps2.model.eager  # noqa: F401  # isort: skip  # before anything of Megatron

import torch
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import BaseMoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class CpuTopKRouter(TopKRouter):
    """Megatron's router; its own product would move the weights to a GPU first."""

    def gating(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight)


class MoeLayer(BaseMoELayer):
    """In the slot of an MLP. Its class's attributes stand for arguments that Megatron does not pass."""

    linears: MLPSubmodules
    groups: ProcessGroupCollection

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config, pg_collection=self.groups)
        self.tp_group = self.groups.tp
        self.router = CpuTopKRouter(config, pg_collection=self.groups)
        self.experts = SequentialMLP(self.num_local_experts, config, self.linears, pg_collection=self.groups)

    def forward(self, hidden: Tensor, **_: object) -> tuple[Tensor, None]:
        """[s, b, h] -> [s, b, h]: of each token, the sum of its experts' outputs by their weights.

        A token's sum is in the order of the experts, whatever other tokens there are.
        """
        shares, is_chosen = self.router(hidden)  # [s*b, experts], weights and whether they count
        tokens = hidden.reshape(-1, hidden.shape[-1])
        out = torch.zeros_like(tokens)
        for index in is_chosen.any(dim=0).nonzero().flatten().tolist():
            rows = is_chosen[:, index].nonzero().flatten()
            # On this tp rank a part of the sum over ffn; they are added once, below.
            part, _bias = self.experts.local_experts[index](tokens[rows], shares[rows, index])
            out.index_add_(0, rows, part)
        return reduce_from_tensor_model_parallel_region(out, group=self.tp_group).view_as(hidden), None


def moe_layer(linears: MLPSubmodules, groups: ProcessGroupCollection) -> type[MoeLayer]:
    """The class for a layer spec: Megatron hands process groups to its own mixtures only."""
    return type("MoeLayer", (MoeLayer,), {"linears": linears, "groups": groups})
