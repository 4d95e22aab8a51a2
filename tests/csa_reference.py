"""CSA as its definition, slowly: dense masks over the whole prompt, softmax in fp64, one process.

Shares no code with the product; what it needs of a setting it reads from the plain fields.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from megatron_sps2.csa_setting import CsaSetting


@dataclass
class Defined:
    """out [s, 1, n, d] in fp64; kept [n_kv][reader] bool [past]; kept_mass [n_kv], the mean over readers."""

    out: Tensor
    kept: list[dict[int, Tensor]] = field(default_factory=list)
    kept_mass: list[float] = field(default_factory=list)

    @property
    def density(self) -> list[float]:
        """Of each KV head, over all readers."""
        counts = [
            (sum(int(keys.sum()) for keys in head.values()), sum(map(len, head.values())))
            for head in self.kept
        ]
        return [kept / far if far else 1.0 for kept, far in counts]


def exact_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention to everything: q [s, 1, n, d], k and v [s, 1, n_kv, d] -> [s, 1, n, d] in fp64."""
    seen = torch.ones(len(q), len(q), dtype=torch.bool).tril()
    return _attend(q, k, v, [seen] * k.shape[2], scale)


def csa_by_definition(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    setting: CsaSetting,
    scale: float,
    layer: int = 0,
    first_kv_head: int = 0,
) -> Defined:
    """q [s, 1, n, d], k and v [s, 1, n_kv, d] of the whole prompt; KV heads count from first_kv_head."""
    num_tokens, group = len(q), q.shape[2] // k.shape[2]
    setting = replace(setting, segment_size=_segment_size(num_tokens, setting), max_segment_size=None)
    size = setting.segment_size
    place = torch.arange(num_tokens)
    causal = place[:, None] >= place
    own = causal & (place[:, None] // size == place // size)
    first_tail = max(0, num_tokens - setting.tail)
    masks, found = [], Defined(torch.empty(0))
    for head in range(k.shape[2]):
        seen, kept, masses = own.clone(), dict[int, Tensor](), []
        for start in range(size, first_tail, size):
            rows = list(range(start, min(start + size, first_tail)))
            share = _share_of_probes(
                q[:, 0, head * group : (head + 1) * group], k[:, 0, head], rows, setting, scale
            )
            keys = _kept(share[:start], start, setting, layer, first_kv_head + head)
            seen[rows, :start] = keys
            kept[start // size] = keys
            masses.append(float(share[:start][keys].sum() + share[start:].sum()))
        seen[first_tail:] = causal[first_tail:]
        masks.append(seen)
        found.kept.append(kept)
        found.kept_mass.append(sum(masses) / len(masses) if masses and setting.num_probes else math.nan)
    found.out = _attend(q, k, v, masks, scale)
    return found


def _segment_size(num_tokens: int, setting: CsaSetting) -> int:
    """Sizes double up to the largest: above 14 of the first, then each time above 2^2.5 as many tokens."""
    sizes = [setting.segment_size]
    while 2 * sizes[-1] <= (setting.max_segment_size or 0):
        sizes.append(2 * sizes[-1])
    passed = sum(num_tokens > 14 * sizes[0] * 2 ** (2.5 * i) for i in range(len(sizes) - 1))
    return sizes[passed]


def _share_of_probes(q: Tensor, k: Tensor, rows: list[int], setting: CsaSetting, scale: float) -> Tensor:
    """q [s, g, d], k [s, d] -> [s]: each key's part of the probes' exact attention, their mean."""
    num = min(setting.num_probes, len(rows))
    if not num:
        return torch.zeros(len(k), dtype=torch.float64)
    num_last = -(-num // 4)
    early = rows[: len(rows) - num_last]
    probes = [early[i * len(early) // (num - num_last)] for i in range(num - num_last)] + rows[-num_last:]
    scores = torch.einsum("pgd,sd->pgs", q[probes].double(), k.double()) * scale
    unseen = torch.arange(len(k)) > torch.tensor(probes)[:, None]
    return scores.masked_fill(unseen[:, None], -math.inf).softmax(-1).mean((0, 1))


def _kept(share: Tensor, start: int, setting: CsaSetting, layer: int, head: int) -> Tensor:
    """[past] shares of the keys before the reader, which begins at `start` -> which it keeps."""
    place = torch.arange(start)
    kept = (place < setting.num_sinks) | (place >= start - setting.window)
    size, reader = setting.segment_size, start // setting.segment_size
    free = share.masked_fill(kept, 0.0)
    for segment in range(reader):
        keys = place[segment * size : (segment + 1) * size]
        level = _level(reader, segment, setting)
        if setting.selector == "strided":
            degree = int(setting.degrees[level])
            kept[keys] |= keys % degree == head % degree
        elif setting.selector == "scored":
            rising = keys[free[keys].argsort()]
            kept[rising[_num_dropped(free[rising], reader, level, setting, layer, head) :]] = True
    return kept


def _num_dropped(rising: Tensor, reader: int, level: int, setting: CsaSetting, layer: int, head: int) -> int:
    """How many of a segment's keys, by rising share, are left out."""
    if setting.floor is None and setting.floors is None:
        if setting.densities is None:
            density = 1 / setting.degrees[level]
        else:
            density = setting.densities[layer][head][level - 1]
        return len(rising) - math.ceil(density * len(rising))
    floor = setting.floor if setting.floors is None else setting.floors[layer][head]
    allowed, total = (1 - floor) / reader, 0.0
    for count, one in enumerate(rising.tolist()):
        total += one
        if floor == 1 or total > allowed:
            return count
    return len(rising)


def _level(reader: int, segment: int, setting: CsaSetting) -> int:
    together = [i for i, size in enumerate(setting.group_sizes) if reader // size == segment // size]
    return min(together, default=len(setting.group_sizes) - 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, masks: list[Tensor], scale: float) -> Tensor:
    """masks [s, s] by KV head."""
    group, outs = q.shape[2] // k.shape[2], []
    for head in range(q.shape[2]):
        scores = q[:, 0, head].double() @ k[:, 0, head // group].double().t() * scale
        weights = scores.masked_fill(~masks[head // group], -math.inf).softmax(-1)
        outs.append(weights @ v[:, 0, head // group].double())
    return torch.stack(outs, dim=1).unsqueeze(1)
