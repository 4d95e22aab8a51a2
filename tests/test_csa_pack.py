"""Kept keys on their way to another rank: what is packed, where it is laid out, by torch and by kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sps2.attention.csa_plan import CsaPlan
from megatron_sps2.attention.csa_routes import CsaRoutes
from megatron_sps2.ops import pack as by_torch
from megatron_sps2.ops import sparsity
from megatron_sps2.ops.pack import Parcels
from tests.csa_shapes import CPU, SHAPES, Shape

WAYS: list[Any] = [by_torch]
try:
    from megatron_sps2.ops.kernels import csa_pack

    WAYS.append(csa_pack)
except ModuleNotFoundError:
    pass
ways = pytest.mark.parametrize(
    "way",
    [
        pytest.param(by_torch, id="torch"),
        pytest.param(
            WAYS[-1],
            id="triton",
            marks=[
                pytest.mark.triton,
                pytest.mark.skipif(len(WAYS) == 1, reason="triton is not installed"),
                pytest.mark.skipif(torch.cuda.is_available(), reason="runs in Triton's interpreter"),
            ],
        ),
    ],
)
DENSITIES = (0.0, 0.02, 0.3, 1.0)


def routes_of(shape: Shape, num_ranks: int, rank: int) -> CsaRoutes:
    return CsaRoutes(CsaPlan(shape.routes.plan.setting, shape.num_tokens, num_ranks), rank, CPU)


def drawn(shape: Shape, num_tasks: int, density: float) -> Tensor:
    """Bits of every task, uint8 [n_kv, tasks, G / 8]."""
    generator = torch.Generator().manual_seed(shape.num_tokens + num_tasks)
    sizes = shape.n_kv, num_tasks, shape.segment_size
    return sparsity.pack_bits(torch.rand(sizes, generator=generator) < density)


def kept_rows(bits: Tensor, tasks: list[list[int]], rows: list[int]) -> list[tuple[int, int]]:
    """(head, row) of all keys of a message, from its definition: plain loops."""
    masks, found = sparsity.unpack_bits(bits), []
    for mine, row in zip(tasks, rows, strict=True):
        for head, of_head in enumerate(masks):
            found += [
                (head, row + key) for key in range(masks.shape[2]) if any(of_head[t, key] for t in mine)
            ]
    return found


def by_parcel(parcels: Parcels) -> list[list[int]]:
    bounds = parcels.first.tolist()
    return [parcels.tasks[start:stop].tolist() for start, stop in zip(bounds, bounds[1:], strict=False)]


@ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_message_holds_each_key_that_a_reader_there_keeps_and_is_laid_out_again(
    way: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every prompt at every rank of 2 and 3, parcels that nobody wants among them; 8 keys a program."""
    if way is not by_torch:
        monkeypatch.setattr(way, "TILE_NUMBERS", 128)
    lengths = set[bool]()
    for i, shape in enumerate(SHAPES):
        for num_ranks, rank in ((2, 0), (2, 1), (3, 1), (3, 2)):
            routes = routes_of(replace(shape, dtype=dtype), num_ranks, rank)
            parcels, density = routes.leaving, DENSITIES[(i + rank + num_ranks) % len(DENSITIES)]
            _, k, v = replace(shape, dtype=dtype).drawn()
            bits = drawn(shape, routes.scoring.num_tasks, density)
            want = kept_rows(bits, by_parcel(parcels), parcels.row.tolist())
            packing = way.unite(bits, parcels)
            assert packing.first[-1] == len(want), (shape, num_ranks, rank)
            packed = way.pack(k, v, packing, parcels, len(want))
            heads, rows = (list(x) for x in zip(*want, strict=True)) if want else ([], [])
            assert torch.equal(packed, torch.stack([k[heads, rows], v[heads, rows]], 1))
            whole = [torch.full(k.shape, 7.0, dtype=dtype) for _ in "kv"]
            # What goes to two ranks is laid out twice, in the same rows.
            way.lay_out(packed, packing, parcels, *whole)
            for found, held in zip(whole, (k, v), strict=True):
                wanted = torch.full(k.shape, 7.0, dtype=dtype)
                wanted[heads, rows] = held[heads, rows]
                assert torch.equal(found, wanted)
            lengths.add(bool(want))
    assert lengths == {False, True}


@ways
def test_what_arrives_is_what_was_sent(way: Any) -> None:
    """Both ends know the bits of a rank's readers, and from them alone the same keys in the same order."""
    for shape in SHAPES:
        sender, receiver = (routes_of(shape, 2, rank) for rank in range(2))
        _, k, v = shape.drawn()
        seen = drawn(shape, receiver.attending.num_tasks, 0.2)
        tasks = sender.tasks_of[1]
        chosen = torch.zeros(shape.n_kv, sender.scoring.num_tasks, seen.shape[2], dtype=torch.uint8)
        chosen[:, tasks] = seen.index_select(1, receiver.arriving_tasks[0])
        leaving, arriving = way.unite(chosen, sender.leaving), way.unite(seen, receiver.arriving)
        held = sender.plan.layout.positions(0)
        mine = [x[:, held] for x in (k, v)]
        packed = way.pack(*mine, leaving, sender.leaving, int(leaving.first[-1]))
        assert int(arriving.first[-1]) == len(packed)
        whole = [torch.full((shape.n_kv, shape.num_tokens, shape.d), torch.nan) for _ in "kv"]
        way.lay_out(packed, arriving, receiver.arriving, *whole)
        for found, x in zip(whole, (k, v), strict=True):
            there = found.isfinite()
            assert torch.equal(found[there], x[there]) and int(there.all(2).sum()) == len(packed)


@ways
def test_control_a_key_that_one_reader_alone_keeps_is_missed_without_its_task(way: Any) -> None:
    routes = routes_of(SHAPES[0], 2, 0)
    bits = drawn(SHAPES[0], routes.scoring.num_tasks, 0.3)
    tasks = by_parcel(routes.leaving)
    fewer = Parcels.of([each[1:] for each in tasks], routes.leaving.row.tolist(), CPU)
    assert max(map(len, tasks)) > 1
    assert way.unite(bits, fewer).first[-1] < way.unite(bits, routes.leaving).first[-1]


def test_own_rows_are_the_segments_that_queries_here_see() -> None:
    """As [position, row] pairs of single keys, in few slices."""
    for shape in SHAPES:
        for num_ranks in (2, 3):
            for rank in range(num_ranks):
                routes = routes_of(shape, num_ranks, rank)
                pairs = [
                    pair
                    for positions, rows in routes.own_rows
                    for pair in zip(
                        range(positions.start, positions.stop), range(rows.start, rows.stop), strict=True
                    )
                ]
                held = routes.plan.layout.positions(rank)
                assert pairs == [(p, row) for row, p in enumerate(held) if p < routes.num_laid_out]
                assert len(routes.own_rows) <= 2
