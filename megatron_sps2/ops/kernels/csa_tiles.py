"""How CSA's kernels cut their work: block sizes from shapes and dtype. Plain integers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_sps2.ops.kernels.launch import interpreting
from megatron_sps2.ops.reads import Reads

# Rows of a wgmma, and what four warps hold of scores without spilling.
MAX_PROBES = 64
MAX_KEYS = 128


def power_of_two(x: int, least: int = 16) -> int:
    """The first not below x; a matmul's sides are 16 at least."""
    return max(least, 1 << max(0, x - 1).bit_length())


def dot_constants(x: Tensor) -> dict[str, Any]:
    """How the kernels multiply tensors like x `[..., d]`. The interpreter's half precision is wrong: fp32."""
    return {
        "D": x.shape[-1],
        "BLOCK_D": power_of_two(x.shape[-1]),
        "UPCAST": interpreting() and x.dtype != torch.float32,
        "PRECISION": "ieee" if x.dtype == torch.float32 else "tf32",
    }


@dataclass(frozen=True, slots=True)
class ProbeTiles:
    """A reader's probes times query heads of a KV head stand in blocks of `probes` rows."""

    probes: int
    num_blocks: int
    keys: int
    dot: dict[str, Any]

    @classmethod
    def of(cls, probes: Tensor, reads: Reads, group: int) -> ProbeTiles:
        most = max((len(reader.probes) for reader in reads.readers), default=0) * group
        rows = min(MAX_PROBES, power_of_two(most))
        keys = min(MAX_KEYS, power_of_two(reads.segment_size))
        return cls(rows, max(1, -(-most // rows)), keys, dot_constants(probes))

    @property
    def padded(self) -> int:
        """Rows of the longest reader."""
        return self.probes * self.num_blocks

    @property
    def constants(self) -> dict[str, Any]:
        return {**self.dot, "PROBES": self.probes, "KEYS": self.keys}


def attend_constants(q: Tensor, num_rows: int) -> dict[str, Any]:
    """For tiles of `num_rows` rows (queries times heads of a KV head) at most, and how they are run.

    Keys lie where a list says that must have come before them: five stages have keys and values on their way
    two tiles ahead.
    """
    dot = dot_constants(q)
    if q.dtype == torch.float32:  # Exact fp32 dots run without tensor cores: slow whatever the tile.
        return {**dot, "ROWS": min(32, power_of_two(num_rows)), "KEYS": 16, "num_warps": 8, "num_stages": 2}
    if num_rows <= 64 or dot["BLOCK_D"] > 128:
        rows, keys = min(64, power_of_two(num_rows)), 64 if dot["BLOCK_D"] <= 128 else 32
        return {**dot, "ROWS": rows, "KEYS": keys, "num_warps": 4, "num_stages": 5}
    return {**dot, "ROWS": 128, "KEYS": 64, "num_warps": 8, "num_stages": 5}
