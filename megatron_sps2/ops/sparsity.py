"""Which keys a reading segment keeps of one KV head's earlier segments: probes, scores, selectors.

Pure tensor functions. Keys are those of whole segments, `[m, G]`: m segments of G tokens, by position.
Nothing here depends on which other segments share a call, so that ranks may split them as they like.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_sps2.ops.product import product
from megatron_sps2.ops.tile import LN2


def probe_rows(num_rows: int, num_probes: int) -> list[int]:
    """Rows of a segment that probe: a quarter are its last ones, the others lie evenly before them."""
    num = min(num_probes, num_rows)
    last = min(num, math.ceil(num / 4))
    before, strided = num_rows - last, num - last
    return [i * before // strided for i in range(strided)] + list(range(before, num_rows))


@dataclass(frozen=True, slots=True)
class Scored:
    """A KV head's keys as the probes of one segment see them.

    weights `[p, m, G]` = 2^(score - top), top `[p, m]`; p counts probes times query heads of the KV head.
    """

    weights: Tensor
    top: Tensor

    def log_sum(self) -> Tensor:
        """`[p]` float64: log2 of the sum over all keys; -inf for none.

        In float64, and each segment's sum by itself, so that rounding does not tell how ranks split them.
        """
        sums = self.weights.sum(-1).double().log2_().add_(self.top)
        return torch.logsumexp(sums * LN2, dim=1) / LN2 if sums.shape[1] else _nothing(sums)

    def mass(self, log_total: Tensor) -> Tensor:
        """`[m, G]`: each key's share of attention, the mean over probes; log_total `[p]` over all keys."""
        share = torch.exp2(self.top - log_total[:, None]).float() / len(log_total)  # [p, m]
        return torch.bmm(share.t().unsqueeze(1), self.weights.transpose(0, 1)).squeeze(1)


def score(probes: Tensor, keys: Tensor, segment_size: int, scale: float) -> Scored:
    """probes `[p, d]`, keys `[m * G, d]` -> how they see each other."""
    scores = product((probes.float() * (scale / LN2)).contiguous(), keys.float().t())
    scores = (
        scores.unflatten(1, (-1, segment_size))
        if len(keys)
        else scores.new_empty(len(probes), 0, segment_size)
    )
    top = scores.amax(-1) if len(keys) else scores.new_empty(len(probes), 0)
    return Scored(scores.sub_(top.unsqueeze(-1)).exp2_(), top)


def own_log_sum(probes: Tensor, rows: Sequence[int], keys: Tensor, scale: float) -> Tensor:
    """probes `[r, g, d]` at `rows` of their own segment, its keys `[s, d]` -> `[r * g]`, as log_sum."""
    scores = (probes.double() * (scale / LN2)) @ keys.double().t()  # [r, g, s]
    unseen = torch.arange(len(keys), device=keys.device) > torch.tensor(rows, device=keys.device)[:, None]
    scores.masked_fill_(unseen.unsqueeze(1), -torch.inf)
    return (torch.logsumexp(scores * LN2, dim=-1) / LN2).flatten()


def total_log_sum(parts: Tensor) -> Tensor:
    """`[ranks, p]` -> `[p]`: log2 of the sum of 2^parts."""
    return torch.logsumexp(parts * LN2, dim=0) / LN2


def always_kept(positions: Tensor, reader_start: int, num_sinks: int, window: int) -> Tensor:
    """Sinks and the window before the reader: `[m, G]` positions -> bool."""
    return (positions < num_sinks) | (positions >= reader_start - window)


def strided(positions: Tensor, degrees: Sequence[float], kv_head: int) -> Tensor:
    """Every degrees[i]-th key of segment i, staggered by head: `[m, G]` positions -> bool (method.md 4)."""
    steps = torch.tensor([int(d) for d in degrees], device=positions.device)[:, None]
    return positions % steps == kv_head % steps


def best(mass: Tensor, counts: Sequence[int]) -> Tensor:
    """The counts[i] keys of segment i with the most mass, and all equals of the last: `[m, G]` -> bool.

    Keys without any mass are kept only where counts[i] is all of them.
    """
    first = mass.shape[1] - torch.tensor(counts, device=mass.device)
    return _at_least(mass, _ascending(mass), first)


def above_floor(mass: Tensor, floor: float, num_segments: int) -> Tensor:
    """The least keys such that each segment drops at most (1 - floor) / num_segments: `[m, G]` -> bool.

    num_segments counts all segments before the reader, those of other ranks too: together they drop at most
    1 - floor of the probes' attention. A floor of 1 keeps all, also what no probe sees.
    """
    if floor >= 1:
        return torch.ones_like(mass, dtype=torch.bool)
    allowed = (1 - floor) / num_segments
    ascending = _ascending(mass)
    dropped = (ascending.cumsum(1, dtype=torch.float64) <= allowed).sum(1)
    return _at_least(mass, ascending, dropped)


def _at_least(mass: Tensor, ascending: Tensor, first: Tensor) -> Tensor:
    """Keys not below the first[i]-th smallest of row i; none where first[i] is the whole row."""
    size = mass.shape[1]
    least = ascending.gather(1, first.clamp(max=size - 1).unsqueeze(1))
    least = least.masked_fill(first.unsqueeze(1) >= size, torch.inf)
    # Mass that rounds to 0 is equal for thousands of keys: none of them is among the best.
    return (mass >= least) & ((mass > 0) | (first == 0).unsqueeze(1))


def _ascending(x: Tensor) -> Tensor:
    """Rows sorted. numpy sorts short rows of floats several times faster than torch on CPU."""
    if x.is_cuda:
        return x.sort(dim=1).values
    return torch.from_numpy(np.sort(x.numpy(), axis=1))


def _nothing(sums: Tensor) -> Tensor:
    return sums.new_full(sums.shape[:1], -torch.inf)


def pack_bits(x: Tensor) -> Tensor:
    """bool `[..., G]`, G a multiple of 8 -> uint8 `[..., G / 8]`; the first key is the lowest bit."""
    if x.device.type == "cpu":
        return torch.from_numpy(np.packbits(x.numpy(), axis=-1, bitorder="little"))
    return (x.unflatten(-1, (-1, 8)) * _places(x)).sum(-1, dtype=torch.uint8)


def unpack_bits(x: Tensor) -> Tensor:
    """The inverse of pack_bits."""
    if x.device.type == "cpu":
        return torch.from_numpy(np.unpackbits(x.numpy(), axis=-1, bitorder="little").view(np.bool_))
    return (x.unsqueeze(-1) & _places(x)).ne(0).flatten(-2)


def _places(x: Tensor) -> Tensor:
    """1, 2, 4 ... 128, made on the device: nothing waits for the host."""
    return 2 ** torch.arange(8, dtype=torch.uint8, device=x.device)
