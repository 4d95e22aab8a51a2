"""The paper's own sparse attention with a segment on each rank (method.md 4): `ops.dilated` over a wire.

Level by level and a head chunk at a time: sampled K, Q and V come to the ranks that hold the heads inside the
group, causal attention there, outputs and their log-sum-exp go back. Level 0 needs no wire and hides the
first arrivals. Knows wires, not models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import torch
from torch import Tensor

from megatron_sps2.attention.prefill import three_phase
from megatron_sps2.ops.attend import attend
from megatron_sps2.ops.dilated import check_levels, sampled
from megatron_sps2.ops.merge import merge
from megatron_sps2.parallel.collectives import Handle, Wire, all_to_all
from megatron_sps2.parallel.layout import HeadGroup, TokenLayout, split_heads

T = TypeVar("T")
Partial = tuple[Tensor, Tensor]  # out [rows, b, m, d] and lse [rows, b, m] of one head group's m queries
Arriving = tuple[Handle[list[Tensor]], ...]  # K, Q, V
Expected = tuple[tuple[int, ...], torch.dtype]  # what a tensor on its way looks like

LSE_BYTES = 4  # travels in fp32


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Head groups that travel together on one level of one rank's group."""

    level: int
    held: dict[int, list[HeadGroup]]  # by rank; ranks outside of the group are missing


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """Who samples which rows and attends with which heads: plain integers."""

    layout: TokenLayout
    group_sizes: Sequence[int]
    degrees: Sequence[int]
    num_heads: int
    num_kv_heads: int
    first_kv_head: int

    def __post_init__(self) -> None:
        check_levels(self.group_sizes, self.degrees, self.layout.num_ranks)
        assert all(len(held) == 1 for held in self.layout.segments), "segments are ranks: contiguous layout"

    def rows(self, rank: int, level: int, head: HeadGroup) -> slice:
        """Which of a rank's tokens the head group samples."""
        start = self.layout.segments[rank][0].start
        return sampled(start, self.first_kv_head + head.kv_head, self.degrees[level])

    def num_rows(self, rank: int, level: int, head: HeadGroup) -> int:
        held = len(self.layout.segments[rank][0])
        return len(range(*self.rows(rank, level, head).indices(held)))

    def chunks(self, rank: int, overlap: bool) -> list[_Chunk]:
        """Level 0 and then every wider level of `rank`; equally many on every rank."""
        found = [_Chunk(0, {})]
        for level, size in list(enumerate(self.group_sizes))[1:]:
            first = rank - rank % size
            split = self._split(size)
            held = {first + i: groups for i, groups in enumerate(split)}
            if overlap:
                most = max(map(len, split))
                found += [_Chunk(level, {p: held[p][c : c + 1] for p in held}) for c in range(most)]
            else:
                found.append(_Chunk(level, held))
        return found

    def _split(self, size: int) -> list[list[HeadGroup]]:
        """Head groups of each rank of a group; ranks beyond the number of query heads get none."""
        used = min(size, self.num_heads)
        return split_heads(self.num_heads, self.num_kv_heads, used) + [[] for _ in range(size - used)]


def dilated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    layout: TokenLayout,
    wire: Wire,
    scale: float,
    group_sizes: Sequence[int],
    degrees: Sequence[int],
    first_kv_head: int = 0,
    overlap: bool = True,
) -> Tensor:
    """q [s/P, b, n, d], k and v [s/P, b, n_kv, d] -> [s/P, b, n, d]; `layout` is contiguous.

    What `ops.dilated.dilated_attention` gives for P segments. `overlap`: a head chunk at a time, the next one
    under way meanwhile; it changes no bit. Raises ValueError for levels that do not fit P.
    """
    plan = _Plan(
        layout=layout,
        group_sizes=group_sizes,
        degrees=degrees,
        num_heads=q.shape[2],
        num_kv_heads=k.shape[2],
        first_kv_head=first_kv_head,
    )
    chunks = plan.chunks(wire.axis.rank, overlap)

    def compute(chunk: _Chunk, arriving: Arriving) -> list[Partial]:
        if chunk.level == 0:
            return [attend(q, k, v, scale=scale, diagonal=0)]
        return _attend_held(arriving, scale)

    homecoming = three_phase(
        chunks,
        lambda chunk: _bring(q, k, v, chunk, plan, wire),
        compute,
        lambda chunk, partials: _give_back(partials, q, chunk, plan, wire),
    )
    return _merge_levels(q, chunks, homecoming, plan, wire.axis.rank)


def dilated_bytes(
    layout: TokenLayout,
    rank: int,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    element_size: int,
    group_sizes: Sequence[int],
    degrees: Sequence[int],
    first_kv_head: int = 0,
    batch_size: int = 1,
) -> dict[str, int]:
    """Bytes that `rank` sends in one `dilated`, by collective.

    A sampled token costs (m + 2) d e to bring and m (d e + 4) to give back for each group of m query heads.
    Head counts are those of one tp rank. A KV head that several ranks of a group read is sent to each.
    """
    plan = _Plan(
        layout=layout,
        group_sizes=group_sizes,
        degrees=degrees,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        first_kv_head=first_kv_head,
    )
    row, sent = head_dim * element_size, {"dilated_in": 0, "dilated_out": 0}
    for chunk in plan.chunks(rank, overlap=False)[1:]:
        for peer in chunk.held.keys() - {rank}:
            for head in chunk.held[peer]:
                tokens = batch_size * plan.num_rows(rank, chunk.level, head)
                sent["dilated_in"] += tokens * (head.num_queries + 2) * row
            for head in chunk.held[rank]:
                tokens = batch_size * plan.num_rows(peer, chunk.level, head)
                sent["dilated_out"] += tokens * head.num_queries * (row + LSE_BYTES)
    return sent


def _bring(q: Tensor, k: Tensor, v: Tensor, chunk: _Chunk, plan: _Plan, wire: Wire) -> Arriving:
    """First phase: K and Q ahead, so that scores can start before V has arrived."""
    if chunk.level == 0:
        return ()
    in_turn = (k, False), (q, True), (v, False)
    return tuple(_sampled_to_heads(x, queries, chunk, plan, wire) for x, queries in in_turn)


def _sampled_to_heads(
    x: Tensor, queries: bool, chunk: _Chunk, plan: _Plan, wire: Wire
) -> Handle[list[Tensor]]:
    """[s/P, b, n, d] -> for each head group held here the sampled tokens of all ranks, [rows, b, m, d]."""
    me, (_, b, _, d) = wire.axis.rank, x.shape
    mine = chunk.held[me]

    def take(head: HeadGroup) -> Tensor:
        heads = slice(head.q_start, head.q_stop) if queries else slice(head.kv_head, head.kv_head + 1)
        return x[plan.rows(me, chunk.level, head), :, heads]

    def expect(rank: int, head: HeadGroup) -> Expected:
        return (plan.num_rows(rank, chunk.level, head), b, head.num_queries if queries else 1, d), x.dtype

    def finish(pieces: list[Tensor]) -> list[Tensor]:
        return [torch.cat(pieces[i :: len(mine)]) for i in range(len(mine))]

    sent = {rank: [take(head) for head in held] for rank, held in chunk.held.items()}
    expected = {rank: [expect(rank, head) for head in mine] for rank in chunk.held}
    return _exchange(wire, "dilated_in", sent, expected, finish, x.device)


def _attend_held(arriving: Arriving, scale: float) -> list[Partial]:
    """Second phase: causal attention among the sampled tokens of each head group held here."""
    k_handle, q_handle, v_handle = arriving
    values = cache(v_handle.wait)

    def one(head: int, keys: Tensor, queries: Tensor) -> Partial:
        return attend(queries, keys, lambda: values()[head], scale=scale, diagonal=0)

    held = zip(k_handle.wait(), q_handle.wait(), strict=True)
    partials = [one(head, keys, queries) for head, (keys, queries) in enumerate(held)]
    values()  # A rank with no head must still take V off the wire.
    return partials


def _give_back(
    partials: list[Partial], q: Tensor, chunk: _Chunk, plan: _Plan, wire: Wire
) -> Handle[list[Partial]]:
    """Third phase: partials of my heads leave; those of my tokens come, by rank and its head groups."""
    if chunk.level == 0:
        return Handle(q, lambda _: partials, None, q)
    me, (_, b, _, d) = wire.axis.rank, q.shape

    def cut(partial: Partial, head: HeadGroup) -> list[tuple[Tensor, ...]]:
        rows = [plan.num_rows(rank, chunk.level, head) for rank in chunk.held]
        return [*zip(*(x.split(rows) for x in partial), strict=True)]

    def expect(head: HeadGroup) -> list[Expected]:
        rows = plan.num_rows(me, chunk.level, head), b, head.num_queries
        return [((*rows, d), q.dtype), (rows, torch.float32)]

    def finish(pieces: list[Tensor]) -> list[Partial]:
        return [*zip(pieces[::2], pieces[1::2], strict=True)]

    cuts = [cut(*pair) for pair in zip(partials, chunk.held[me], strict=True)]
    sent = {rank: [x for of_head in cuts for x in of_head[i]] for i, rank in enumerate(chunk.held)}
    expected = {rank: [e for head in held for e in expect(head)] for rank, held in chunk.held.items()}
    return _exchange(wire, "dilated_out", sent, expected, finish, q.device)


def _exchange(
    wire: Wire,
    name: str,
    sent: dict[int, list[Tensor]],
    expected: dict[int, list[Expected]],
    finish: Callable[[list[Tensor]], T],
    device: torch.device,
) -> Handle[T]:
    """sent[p] goes to rank p as bytes; `finish` gets what came, expected[p] of each rank p in turn."""
    nothing = torch.empty(0, dtype=torch.uint8, device=device)

    def part(rank: int) -> Tensor:
        return torch.cat([nothing, *(x.reshape(-1).view(torch.uint8) for x in sent.get(rank, []))])

    def unpack(flat: Tensor) -> T:
        wanted = [one for ones in expected.values() for one in ones]
        raw = flat.split([_num_bytes(one) for one in wanted])
        return finish([_from_bytes(piece, one) for piece, one in zip(raw, wanted, strict=True)])

    ranks = range(wire.axis.size)
    num_bytes = [sum(map(_num_bytes, expected.get(rank, []))) for rank in ranks]
    return all_to_all(wire, name, [part(rank) for rank in ranks], num_bytes, unpack)


def _num_bytes(one: Expected) -> int:
    shape, dtype = one
    return math.prod(shape) * dtype.itemsize


def _from_bytes(raw: Tensor, one: Expected) -> Tensor:
    shape, dtype = one
    if raw.storage_offset() % dtype.itemsize:
        raw = raw.clone()  # An odd number of bf16 lies before: such a view is refused.
    return raw.view(dtype).view(shape)


def _merge_levels(
    q: Tensor, chunks: list[_Chunk], results: list[list[Partial]], plan: _Plan, rank: int
) -> Tensor:
    """What came home of every level -> [s/P, b, n, d]; a query is merged over the levels that sample it."""
    outs = q.new_empty(len(plan.degrees), *q.shape)
    lses = q.new_full(outs.shape[:-1], -torch.inf, dtype=torch.float32)
    outs[0], lses[0] = results[0][0]
    for chunk, partials in zip(chunks[1:], results[1:], strict=True):
        heads = [head for held in chunk.held.values() for head in held]
        for head, partial in zip(heads, partials, strict=True):
            place = chunk.level, plan.rows(rank, chunk.level, head), slice(None)
            queries = slice(head.q_start, head.q_stop)
            outs[*place, queries], lses[*place, queries] = partial
    return merge(outs, lses)[0]
