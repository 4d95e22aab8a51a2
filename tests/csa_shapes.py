"""Prompts, rules and random tensors for tests of CSA's kernels. At one rank unless a test says otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_sps2.attention.csa_plan import CsaPlan
from megatron_sps2.attention.csa_routes import CsaRoutes
from megatron_sps2.csa_setting import CsaSetting
from megatron_sps2.ops.keep_rule import KeepRule, RuleKind
from megatron_sps2.ops.reads import Reads

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Shape:
    """A prompt and its heads; `group` query heads to each KV head."""

    num_tokens: int
    segment_size: int = 16
    num_probes: int = 5
    tail: int = 7
    n_kv: int = 2
    group: int = 3
    d: int = 8
    dtype: torch.dtype = torch.float32

    @property
    def routes(self) -> CsaRoutes:
        setting = CsaSetting(
            segment_size=self.segment_size,
            num_probes=self.num_probes,
            tail=self.tail,
            group_sizes=(1, 2, 4),
            degrees=(1, 2, 5),
        )
        return CsaRoutes(CsaPlan(setting, self.num_tokens, 1), 0, CPU)

    def drawn(self, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """q [s, n, d], k and v [n_kv, s, d], none of them contiguous; a few keys matter most."""
        generator = torch.Generator().manual_seed(seed)
        q = torch.randn(self.num_tokens, 2 * self.n_kv * self.group, self.d, generator=generator)[:, ::2]
        k, v = torch.randn(2, self.num_tokens, self.n_kv, self.d, generator=generator).transpose(1, 2)
        return (2 * q).to(self.dtype), k.to(self.dtype), v.to(self.dtype)


# Ragged last segments, tails within one segment and over some, segments of no power of two, one reader.
SHAPES = [
    Shape(75),
    Shape(75, tail=41, n_kv=1, group=4),
    Shape(76, segment_size=24, d=24),
    Shape(64, tail=0, n_kv=3, group=1, num_probes=1),
    Shape(40, segment_size=32, d=16, tail=3),
    Shape(90, segment_size=40, num_probes=40, n_kv=1, group=2, tail=1),  # probes of more than one block
]


def rule(kind: RuleKind, reads: Reads, n_kv: int, *, num_sinks: int = 2, window: int = 5) -> KeepRule:
    """Budgets that differ by head, and where they may by level."""
    size = reads.segment_size
    rows: dict[RuleKind, list[list[float]]] = {
        "none": [[0.0], [0.0], [0.0]],
        "strided": [[1, 2, 5], [1, 3, 4], [1, 1, 7]],
        "floor": [[0.9], [1.0], [0.5]],
        "best": [[size, 1, size // 2], [size, size, 0], [size, 5, 3]],
    }
    budgets: Any = torch.tensor(rows[kind][:n_kv], dtype=torch.float64)
    return KeepRule(kind=kind, num_sinks=num_sinks, window=window, budgets=budgets, first_head=1)
