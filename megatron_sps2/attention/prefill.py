"""Exact prefill strategies: ulysses, pass_kv, pass_q (method.md section 3).

All take and give the sequence layout [s/P, b, n, d], so a layer does not know which one runs. Heads are cut
into chunks; while a chunk attends, the next one arrives and the last one leaves. Knows wires, not models.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from megatron_sps2.attention.strategy import LOCAL
from megatron_sps2.ops.kernel_set import TORCH, Kernels
from megatron_sps2.parallel.collectives import (
    Handle,
    Wire,
    gather_tokens,
    heads_to_seq,
    return_partials,
    seq_to_heads,
)
from megatron_sps2.parallel.layout import HeadGroup, Segment, TokenLayout, head_range, split_heads

Chunk = TypeVar("Chunk")
Arrived = TypeVar("Arrived")
Output = TypeVar("Output")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillShape:
    """Everything a strategy knows beside Q, K and V."""

    layout: TokenLayout  # of the new tokens
    wire: Wire
    scale: float
    # True: a head chunk at a time, the next one under way meanwhile. False: all heads in one exchange.
    overlap: bool
    # This rank's shard of the context before the prompt, k and v [c/P, b, n_kv, d]; pass_q only.
    past: tuple[Tensor, Tensor] | None = None
    kernels: Kernels = TORCH


class Strategy(Protocol):
    """q [s/P, b, n, d], k and v [s/P, b, n_kv, d] -> [s/P, b, n, d]"""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, shape: PrefillShape) -> Tensor: ...


def three_phase(
    chunks: Sequence[Chunk],
    bring: Callable[[Chunk], Arrived],
    compute: Callable[[Chunk, Arrived], Output],
    give_back: Callable[[Chunk, Output], Handle[Result]],
) -> list[Result]:
    """Communication, computation, communication: chunk c+1 arrives and c-1 leaves while c computes."""
    arriving = bring(chunks[0])
    leaving = []
    for index, chunk in enumerate(chunks):
        ahead = bring(chunks[index + 1]) if index + 1 < len(chunks) else None
        leaving.append(give_back(chunk, compute(chunk, arriving)))
        if ahead is not None:
            arriving = ahead
    return [handle.wait() for handle in leaving]


def ulysses(q: Tensor, k: Tensor, v: Tensor, shape: PrefillShape) -> Tensor:
    """All-to-all to whole sequences of a few heads, causal attention there, all-to-all back."""
    _refuse_past(shape, "ulysses")
    wire, tokens = shape.wire, shape.layout.tokens_per_rank
    split = split_heads(q.shape[2], k.shape[2], wire.axis.size)

    def bring(groups: list[list[HeadGroup]]) -> tuple[Handle[Tensor], Handle[Tensor], Handle[Tensor]]:
        q_heads, kv_heads = zip(*map(head_range, groups), strict=True)
        # K and Q first, so that scores can start before V has arrived.
        k_handle = seq_to_heads(k, wire, tokens, kv_heads, "seq_to_heads_k")
        q_handle = seq_to_heads(q, wire, tokens, q_heads, "seq_to_heads_q")
        return k_handle, q_handle, seq_to_heads(v, wire, tokens, kv_heads, "seq_to_heads_v")

    def compute(
        groups: list[list[HeadGroup]], arrived: tuple[Handle[Tensor], Handle[Tensor], Handle[Tensor]]
    ) -> Tensor:
        k_handle, q_handle, v_handle = arrived
        return _attend_groups(q_handle.wait(), k_handle.wait(), v_handle.wait, groups[wire.axis.rank], shape)

    def give_back(groups: list[list[HeadGroup]], out: Tensor) -> Handle[list[Tensor]]:
        return heads_to_seq(out, wire, tokens, [sum(g.num_queries for g in held) for held in groups])

    chunks = _head_chunks(split, in_chunks(q, wire, shape.overlap))
    results = three_phase(chunks, bring, compute, give_back)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    for groups, pieces in zip(chunks, results, strict=True):
        for held, piece in zip(groups, pieces, strict=True):
            (start, stop), _ = head_range(held)
            out[:, :, start:stop] = piece
    return out


def pass_kv(q: Tensor, k: Tensor, v: Tensor, shape: PrefillShape) -> Tensor:
    """K and V of every rank come to the queries; any head count."""
    _refuse_past(shape, "pass_kv")
    wire, layout, per_kv = shape.wire, shape.layout, q.shape[2] // k.shape[2]
    tokens = layout.tokens_per_rank

    def bring(heads: range) -> tuple[Handle[Tensor], Handle[Tensor]]:
        kv = slice(heads.start, heads.stop)
        k_handle = gather_tokens(k[:, :, kv], wire, tokens, "exchange_k")
        return k_handle, gather_tokens(v[:, :, kv], wire, tokens, "exchange_v")

    def compute(heads: range, arrived: tuple[Handle[Tensor], Handle[Tensor]]) -> Tensor:
        keys = _to_natural_order(arrived[0].wait(), layout)
        values = cache(lambda: _to_natural_order(arrived[1].wait(), layout))
        queries = q[:, :, heads.start * per_kv : heads.stop * per_kv]
        outs, first = [], 0
        for segment in layout.segments[wire.axis.rank]:
            mine = queries[first : first + len(segment)]
            first += len(segment)
            outs.append(_attend_up_to(mine, keys, values, segment, shape))
        values()  # A rank with no token must still take V off the wire.
        return torch.cat(outs)

    chunks = kv_chunks(k.shape[2], in_chunks(k, wire, shape.overlap))
    results = three_phase(chunks, bring, compute, lambda _, out: _stays(out))
    return torch.cat(results, dim=2)


def pass_q(q: Tensor, k: Tensor, v: Tensor, shape: PrefillShape) -> Tensor:
    """Queries travel, KV stays; partial outputs come home and are merged. Takes a cached context."""
    wire, layout, per_kv = shape.wire, shape.layout, q.shape[2] // k.shape[2]
    tokens = layout.tokens_per_rank

    def bring(heads: range) -> Handle[Tensor]:
        return gather_tokens(
            q[:, :, heads.start * per_kv : heads.stop * per_kv], wire, tokens, "gather_queries"
        )

    def compute(heads: range, arrived: Handle[Tensor]) -> tuple[Tensor, Tensor]:
        queries = _to_natural_order(arrived.wait(), layout)
        kv = slice(heads.start, heads.stop)
        past = (shape.past[0][:, :, kv], shape.past[1][:, :, kv]) if shape.past else None
        out, lse = _partial_of_shard(queries, k[:, :, kv], v[:, :, kv], past, shape)
        return _to_rank_order(out, layout), _to_rank_order(lse, layout)

    def give_back(_: range, partial: tuple[Tensor, Tensor]) -> Handle[tuple[Tensor, Tensor]]:
        return return_partials(*partial, wire, tokens)

    chunks = kv_chunks(k.shape[2], in_chunks(k, wire, shape.overlap))
    results = three_phase(chunks, bring, compute, give_back)
    return torch.cat([shape.kernels.merge(outs, lses)[0] for outs, lses in results], dim=2)


def local(q: Tensor, k: Tensor, v: Tensor, shape: PrefillShape) -> Tensor:
    """A prompt that lives wholly on one rank: nothing travels, other ranks have no row of it."""
    if not len(q):
        return torch.empty_like(q)
    if shape.past is None:
        return shape.kernels.attend(q, k, v, scale=shape.scale, diagonal=0)[0]
    return _partial_of_shard(q, k, v, shape.past, shape)[0]


STRATEGIES: dict[str, Strategy] = {"ulysses": ulysses, "pass_kv": pass_kv, "pass_q": pass_q, LOCAL: local}


def _partial_of_shard(
    queries: Tensor, k: Tensor, v: Tensor, past: tuple[Tensor, Tensor] | None, shape: PrefillShape
) -> tuple[Tensor, Tensor]:
    """All queries [s, b, n, d] against this rank's keys -> partial (out, lse), rows in order of position."""
    s, b, n, _ = queries.shape
    attend, merge = shape.kernels.attend, shape.kernels.merge
    out = torch.zeros_like(queries, memory_format=torch.contiguous_format)
    lse = queries.new_full((s, b, n), float("-inf"), dtype=torch.float32)
    if past is not None and len(past[0]) and s:
        out, lse = attend(queries, *past, scale=shape.scale, diagonal=None)
    first = 0
    for segment in shape.layout.segments[shape.wire.axis.rank]:
        keys, values = k[first : first + len(segment)], v[first : first + len(segment)]
        first += len(segment)
        if not len(segment):
            continue
        # Only queries from the segment's first token on see any of it.
        seen = attend(queries[segment.start :], keys, values, scale=shape.scale, diagonal=0)
        both = merge(
            torch.stack([out[segment.start :], seen[0]]), torch.stack([lse[segment.start :], seen[1]])
        )
        out[segment.start :], lse[segment.start :] = both
    return out, lse


def _attend_up_to(
    q: Tensor, k: Tensor, v: Callable[[], Tensor], segment: Segment, shape: PrefillShape
) -> Tensor:
    """The queries of a segment to all keys up to its end."""
    if not len(q):
        return torch.empty_like(q)
    keys, stop = k[: segment.stop], segment.stop
    return shape.kernels.attend(q, keys, lambda: v()[:stop], scale=shape.scale, diagonal=segment.start)[0]


def _attend_groups(
    q: Tensor, k: Tensor, v: Callable[[], Tensor], groups: list[HeadGroup], shape: PrefillShape
) -> Tensor:
    """Causal attention of a rank's heads: q [s, b, n/P, d], k and v [s, b, n_kv/P, d] -> [s, b, n/P, d]."""
    if not groups or not len(q):
        v()
        return torch.empty_like(q)
    sizes = [group.num_queries for group in groups]
    attend, scale = shape.kernels.attend, shape.scale
    if len(set(sizes)) == 1:
        return attend(q, k, v, scale=scale, diagonal=0)[0]
    values = v()  # A KV head shared with a neighbouring rank has fewer queries here: one group at a time.
    outs = [
        attend(part, k[:, :, i : i + 1], values[:, :, i : i + 1], scale=scale, diagonal=0)[0]
        for i, part in enumerate(q.split(sizes, dim=2))
    ]
    return torch.cat(outs, dim=2)


def _head_chunks(split: list[list[HeadGroup]], overlap: bool) -> list[list[list[HeadGroup]]]:
    """Chunk c holds each rank's c-th head group, or nothing where a rank has fewer."""
    if not overlap:
        return [split]
    return [[held[c : c + 1] for held in split] for c in range(max(map(len, split)))]


def in_chunks(x: Tensor, wire: Wire, overlap: bool) -> bool:
    """On one rank nothing is under way meanwhile; a head at a time still takes less of a CPU's memory."""
    return overlap and not (wire.axis.size == 1 and x.is_cuda)


def kv_chunks(num_kv_heads: int, overlap: bool) -> list[range]:
    return [range(kv, kv + 1) for kv in range(num_kv_heads)] if overlap else [range(num_kv_heads)]


def _to_natural_order(x: Tensor, layout: TokenLayout) -> Tensor:
    """[s, ...] rank after rank -> [s, ...] in order of position."""
    return torch.cat([x[slab.offset : slab.offset + len(slab.segment)] for slab in layout.slabs()])


def _to_rank_order(x: Tensor, layout: TokenLayout) -> Tensor:
    """[s, ...] in order of position -> [s, ...] rank after rank."""
    return torch.cat([x[segment.start : segment.stop] for held in layout.segments for segment in held])


def _refuse_past(shape: PrefillShape, name: str) -> None:
    assert shape.past is None, f"{name} has no cached context: choose_strategy should have said pass_q"


def _stays(out: Tensor) -> Handle[Tensor]:
    return Handle(out, lambda whole: whole, None, out)
