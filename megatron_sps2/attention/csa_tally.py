"""What CSA kept of one prompt, counted on each rank and added up over ranks.

Plain sums, so that parts of several ranks can be added. Knows no wires.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megatron_sps2.attention.spans import CSA_SPANS, Spans

# Columns of the counts: summed kept mass, how many (segment, KV head) reads it sums, kept and far keys.
_MASS, _READS, _KEPT, _FAR = range(4)
# Entries after the counts: bytes sent, keys sent, seconds of each span.
_NUM_SINGLES = 2 + len(CSA_SPANS)


class CsaTally:
    """Counts of one rank by layer and KV head of its tp rank; they stay on `device` until encoded."""

    def __init__(self, num_layers: int, num_kv_heads: int, device: torch.device | str = "cpu") -> None:
        self.num_layers, self.num_kv_heads, self.device = num_layers, num_kv_heads, torch.device(device)
        self._counts = torch.zeros(num_layers, num_kv_heads, 4, dtype=torch.float64, device=device)
        self.bytes_sent = 0
        self.keys_sent = 0
        self.spans = Spans()

    def read(self, layer: int, kv_heads: range, *, kept: Tensor | int, far: int) -> None:
        """Of each of these heads, readers keep `kept` [n_kv] of `far` keys that lie on this rank."""
        self._counts[layer, kv_heads.start : kv_heads.stop, _KEPT] += kept
        self._counts[layer, kv_heads.start : kv_heads.stop, _FAR] += far

    def mass(self, layer: int, kv_heads: range, shares: Tensor, *, reads: int) -> None:
        """Parts [n_kv] of the probes' attention that readers keep; `reads` counts a reader once, at home."""
        self._counts[layer, kv_heads.start : kv_heads.stop, _MASS] += shares
        self._counts[layer, kv_heads.start : kv_heads.stop, _READS] += reads

    def encode(self) -> Tensor:
        """[num_layers * n_kv * 4 + a few] float64 on the host, to be sent."""
        seconds = [self.spans.seconds[name] for name in CSA_SPANS]
        singles = torch.tensor([self.bytes_sent, self.keys_sent, *seconds], dtype=torch.float64)
        return torch.cat([self._counts.flatten().cpu(), singles])


@dataclass(frozen=True, slots=True, kw_only=True)
class CsaReport:
    """One request's CSA over all ranks. Tables are [layer][KV head].

    kept_mass: share of the probes' attention that was kept, the mean over reads; None without probes.
    density: share of the keys of earlier segments that was kept. bytes_exact: by formula, what the exact
    strategy would have sent in its place; both over all ranks and layers.
    """

    setting: str
    kept_mass: float | None
    density: float
    bytes_sent: int
    bytes_exact: int
    # By formula, what CSA sends for these keys; equal to bytes_sent.
    bytes_formula: int
    keys_sent: int
    # Of the attention, by span, the mean over ranks.
    seconds: dict[str, float]
    mass_table: tuple[tuple[float | None, ...], ...]
    density_table: tuple[tuple[float | None, ...], ...]

    def to_json(self) -> dict[str, Any]:
        """What comes with an answer."""
        return {
            "setting": self.setting,
            "kept_mass": self.kept_mass,
            "density": self.density,
            "bytes_sent": self.bytes_sent,
            "bytes_exact": self.bytes_exact,
            "seconds": self.seconds,
        }


def add_up(
    encoded: Tensor,
    *,
    tp_size: int,
    num_layers: int,
    setting: str,
    bytes_exact: int,
    bytes_formula: Callable[[int], int],
) -> CsaReport:
    """`[sp_size * tp_size, entries]` of all ranks of a replica, tp innermost -> the report.

    bytes_formula gives all bytes by the number of keys sent.
    """
    ranks = encoded.double().cpu()
    counts, singles = ranks[:, :-_NUM_SINGLES], ranks[:, -_NUM_SINGLES:]
    counts = counts.reshape(-1, tp_size, num_layers, counts.shape[1] // num_layers // 4, 4)
    sent, keys_sent = (int(total) for total in singles[:, :2].sum(0))
    # Sum over the sp axis; tp ranks hold different heads, one after the other.
    table = counts.sum(0).permute(1, 0, 2, 3).flatten(1, 2)  # [layers, n_kv, 4]
    mass, reads, kept, far = table.sum((0, 1)).tolist()
    return CsaReport(
        setting=setting,
        kept_mass=mass / reads if reads else None,
        density=kept / far if far else 1.0,
        bytes_sent=sent,
        bytes_exact=bytes_exact,
        bytes_formula=bytes_formula(keys_sent),
        keys_sent=keys_sent,
        seconds=dict(zip(CSA_SPANS, singles[:, 2:].mean(0).tolist(), strict=True)),
        mass_table=tuple(
            tuple(_share(head[_MASS], head[_READS], None) for head in layer) for layer in table.tolist()
        ),
        density_table=tuple(
            tuple(_share(head[_KEPT], head[_FAR], 1.0) for head in layer) for layer in table.tolist()
        ),
    )


def _share(part: float, whole: float, empty: float | None) -> float | None:
    return part / whole if whole else empty
