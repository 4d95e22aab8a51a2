"""A CSA setting's budgets for all layers and KV heads of a rank, as one tensor. Knows no tokens."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megatron_sps2.csa_setting import CsaSetting
from megatron_sps2.ops.keep_rule import RuleKind


def rule_kind(setting: CsaSetting) -> RuleKind:
    if setting.selector == "scored":
        return "floor" if setting.is_adaptive else "best"
    assert setting.selector != "dilated", "the paper's own variant keeps nothing by rule"
    return setting.selector


def budgets(setting: CsaSetting, num_layers: int, heads: range) -> Tensor:
    """float64 [num_layers, n_kv, levels or 1] as KeepRule has them; heads are those of the model."""
    rows = [[_of_head(setting, layer, head) for head in heads] for layer in range(num_layers)]
    return torch.tensor(rows, dtype=torch.float64)


def _of_head(setting: CsaSetting, layer: int, head: int) -> list[float]:
    kind, levels = rule_kind(setting), range(1, len(setting.degrees))
    if kind == "none":
        return [0.0]
    if kind == "strided":
        return list(setting.degrees)
    if kind == "floor":
        return [setting.floor_of(layer, head)]
    # Level 0 is the own segment, which is read whole.
    shares = [1.0, *(setting.density_of(layer, head, level) for level in levels)]
    return [math.ceil(share * setting.segment_size) for share in shares]
