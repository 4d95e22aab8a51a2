"""Every collective on real ranks against slices of the whole tensor, with the bytes it books."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sps2.config import ParallelConfig
from megatron_sps2.parallel.collectives import (
    PLAN_BYTES,
    Wire,
    broadcast_plan,
    from_first_rank,
    gather_objects,
    gather_tokens,
    heads_to_seq,
    return_partials,
    route_rows,
    seq_to_heads,
    typed_rows,
)
from megatron_sps2.parallel.groups import ParallelGroups
from megatron_sps2.parallel.layout import head_range, split_heads
from megatron_sps2.parallel.ledger import Ledger
from megatron_sps2.parallel.mailbox import open_mailbox
from tests.broken_wire import exchange_skipped
from tests.ranks import run_ranks

D = 4
DTYPES = (torch.float32, torch.bfloat16)
# Tokens on each rank: level, uneven, with empty shards, none at all.
SHARDS = {
    1: [[5], [0]],
    2: [[3, 3], [7, 0], [0, 2], [0, 0]],
    3: [[7, 0, 3], [0, 0, 1]],
    4: [[2, 2, 2, 2], [7, 0, 3, 1]],
}


def sp_wire(by_mail: bool = False) -> Wire:
    axis = ParallelGroups.create(ParallelConfig(sp_size=dist.get_world_size())).sp
    gather = functools.partial(gather_objects, axis=axis)
    mailbox = open_mailbox(axis, gather, 60.0, axis.size) if by_mail else None
    assert by_mail == (mailbox is not None), "no mailbox between ranks of one host"
    return Wire(axis, Ledger(), mailbox)


def numbered(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Every element its own number, so far as bf16 tells them apart; none is 0."""
    return (torch.arange(torch.Size(shape).numel(), dtype=torch.float32) % 251 + 1).view(shape).to(dtype)


def shard(x: Tensor, tokens: list[int], rank: int) -> Tensor:
    return x.split(tokens)[rank]


def each_case(check: Callable[..., bool], wire: Wire, skipped: bool) -> bool:
    """On a rank: True when `check` holds for all shard lengths and dtypes."""
    with exchange_skipped(skipped):
        # A rank that stopped at the first failure would leave others waiting.
        held = [check(wire, tokens, dtype) for tokens in SHARDS[wire.axis.size] for dtype in DTYPES]
    return all(held)


def booked(wire: Wire, name: str, send: Callable[[], Any]) -> tuple[Any, int]:
    """What a collective gave, and the bytes it booked under `name`."""
    before = wire.ledger.total("setup", name)
    return send(), wire.ledger.total("setup", name) - before


def head_layouts_hold(wire: Wire, tokens: list[int], dtype: torch.dtype) -> bool:
    """seq_to_heads gives whole sequences of this rank's heads; heads_to_seq brings them back."""
    me, size = wire.axis.rank, wire.axis.size
    good = True
    for n, n_kv, b in ((9, 9, 1), (9, 3, 2), (8, 2, 1)):
        whole = numbered(sum(tokens), b, n, D, dtype=dtype)
        heads = [head_range(held)[0] for held in split_heads(n, n_kv, size)]
        mine = shard(whole, tokens, me)
        got, sent = booked(
            wire, "seq_to_heads", lambda x=mine, h=heads: seq_to_heads(x, wire, tokens, h).wait()
        )
        start, stop = heads[me]
        good &= torch.equal(got, whole[:, :, start:stop])
        assert sent == tokens[me] * b * (n - (stop - start)) * D * dtype.itemsize
        counts = [stop - start for start, stop in heads]
        back, sent = booked(
            wire, "heads_to_seq", lambda x=got, c=counts: heads_to_seq(x, wire, tokens, c).wait()
        )
        good &= torch.equal(torch.cat(back, dim=2), mine)
        assert sent == (sum(tokens) - tokens[me]) * b * counts[me] * D * dtype.itemsize
    return good


def strided_input_holds(wire: Wire, tokens: list[int], dtype: torch.dtype) -> bool:
    """The same from slices and transposes that are not contiguous."""
    me, size = wire.axis.rank, wire.axis.size
    whole = numbered(sum(tokens), 1, 3 * 8, D, dtype=dtype)[:, :, 8:16]
    assert sum(tokens) < 2 or not whole.is_contiguous()
    heads = [head_range(held)[0] for held in split_heads(8, 8, size)]
    got = seq_to_heads(shard(whole, tokens, me), wire, tokens, heads).wait()
    turned = numbered(D, 8, 1, sum(tokens), dtype=dtype).permute(3, 2, 1, 0)
    gathered = gather_tokens(shard(turned, tokens, me), wire, tokens, "x").wait()
    return torch.equal(got, whole[:, :, slice(*heads[me])]) and torch.equal(gathered, turned)


def overlapping_heads_hold(wire: Wire, tokens: list[int], dtype: torch.dtype) -> bool:
    """One KV head that every rank reads goes to all of them."""
    whole = numbered(sum(tokens), 1, 1, D, dtype=dtype)
    mine, size = shard(whole, tokens, wire.axis.rank), wire.axis.size
    got, sent = booked(wire, "seq_to_heads", lambda: seq_to_heads(mine, wire, tokens, [(0, 1)] * size).wait())
    assert sent == (size - 1) * mine.numel() * dtype.itemsize
    return torch.equal(got, whole)


def gathering_holds(wire: Wire, tokens: list[int], dtype: torch.dtype) -> bool:
    good = True
    for row in ((), (3,), (2, 3, D)):
        whole = numbered(sum(tokens), *row, dtype=dtype)
        mine = shard(whole, tokens, wire.axis.rank)
        got, sent = booked(wire, "g", lambda x=mine: gather_tokens(x, wire, tokens, "g").wait())
        good &= torch.equal(got, whole)
        assert sent == (wire.axis.size - 1) * mine.numel() * dtype.itemsize
    return good


def partials_hold(wire: Wire, tokens: list[int], dtype: torch.dtype) -> bool:
    """Rank r's partial is the whole times r + 1; the LSE comes home to the last bit, -inf too."""
    me, size, s = wire.axis.rank, wire.axis.size, sum(tokens)
    good = True
    for batch in ((), (2,)):
        lse = 1 / numbered(s, *batch, 3)  # not exact in bf16
        lse[..., 0] = -torch.inf
        out = numbered(s, *batch, 3, D)
        back, sent = booked(
            wire,
            "return_partials",
            lambda o=out, x=lse: return_partials((o * (me + 1)).to(dtype), x * (me + 1), wire, tokens).wait(),
        )
        outs = [shard((out * (rank + 1)).to(dtype), tokens, me) for rank in range(size)]
        lses = [shard(lse * (rank + 1), tokens, me) for rank in range(size)]
        good &= torch.equal(back[0], torch.stack(outs)) and torch.equal(back[1], torch.stack(lses))
        assert back[0].dtype == dtype and back[1].dtype == torch.float32
        rows = 3 * torch.Size(batch).numel()
        assert sent == (s - tokens[me]) * rows * (D * dtype.itemsize + 4) * (size > 1)
    return good


def routing_holds(wire: Wire, tokens: list[int], dtype: torch.dtype) -> bool:
    """Rank r sends (r + p) % 3 rows to rank p."""
    me, ranks = wire.axis.rank, range(wire.axis.size)
    rows = {
        (r, p): numbered(2, D, dtype=dtype)[: (r + p) % 3] * (r * 8 + p + 1) % 251
        for r in ranks
        for p in ranks
    }
    out = torch.cat([rows[me, p] for p in ranks])
    sent_to, from_each = [(me + p) % 3 for p in ranks], [(r + me) % 3 for r in ranks]
    got, sent = booked(wire, "r", lambda: route_rows(out, wire, sent_to, from_each, "r").wait())
    assert sent == (sum(sent_to) - sent_to[me]) * D * dtype.itemsize
    return torch.equal(got, torch.cat([rows[r, me] for r in ranks]))


CHECKS = [
    *(head_layouts_hold, strided_input_holds, overlapping_heads_hold),
    *(gathering_holds, partials_hold, routing_holds),
]


def all_checks(skipped: bool, by_mail: bool) -> list[bool]:
    wire = sp_wire(by_mail)
    return [each_case(check, wire, skipped) for check in CHECKS]


needs_x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="no mailbox but on x86")
by_both = pytest.mark.parametrize("by_mail", [False, pytest.param(True, marks=needs_x86)])


@by_both
@pytest.mark.parametrize("size", SHARDS)
def test_every_layout_change_gives_the_slices_of_the_whole_and_books_its_bytes(
    size: int, by_mail: bool
) -> None:
    for good in run_ranks(size, all_checks, False, by_mail and size > 1):
        assert dict(zip((check.__name__ for check in CHECKS), good, strict=True)) == {
            check.__name__: True for check in CHECKS
        }


@by_both
def test_control_without_exchange_every_layout_change_is_wrong(by_mail: bool) -> None:
    results = run_ranks(3, all_checks, True, by_mail)
    # On all ranks, as one without any token has nothing to get wrong.
    assert [all(good) for good in zip(*results, strict=True)] == [False] * len(CHECKS)


def broadcasts(sizes: list[int]) -> list[tuple[bool, int]]:
    """On a rank: for plans of about these many bytes, whether it arrived, and the bytes booked."""
    wire, found = sp_wire(), []
    leader = wire.axis.rank == 0
    for size in sizes:
        plan = {"ids": bytes(i % 256 for i in range(size)), "none": None}
        before = wire.ledger.total("setup", "broadcast_plan")
        got = broadcast_plan(plan if leader else None, wire, torch.device("cpu"))
        found.append((got == plan, wire.ledger.total("setup", "broadcast_plan") - before))
    return found


def test_plans_of_any_size_arrive_on_every_rank() -> None:
    overhead = 40  # of pickle, about: the sizes around PLAN_BYTES reach both sides of the edge
    edge = list(range(PLAN_BYTES - 2 * overhead, PLAN_BYTES + 1, 8))
    sizes = [0, 100, *edge, 3 * PLAN_BYTES]
    results = run_ranks(3, broadcasts, sizes)
    assert all(arrived for found in results for arrived, _ in found)
    sent = [num_bytes for _, num_bytes in results[0]]
    assert sent[0] == sent[1] == 2 * (8 + PLAN_BYTES), "a small plan is one message to each of two ranks"
    assert 2 * 3 * PLAN_BYTES < sent[-1] < 2 * (8 + 3 * PLAN_BYTES + 2 * overhead)
    assert sent[2] == sent[0] < sent[len(edge) + 1], "the edge between one message and two was not met"
    assert all(num_bytes == 0 for found in results[1:] for _, num_bytes in found)
    assert run_ranks(1, broadcasts, [10, 3 * PLAN_BYTES]) == [[(True, 0), (True, 0)]]


def agreements() -> list[Any]:
    """On a rank: what rank 0 made, what it raised, and what everybody said."""
    wire, found = sp_wire(), list[Any]()

    def only_first() -> str:
        assert dist.get_rank() == 0, "another rank made it"
        return "made by 0"

    def broken(error: Exception) -> Callable[[], None]:
        def make() -> None:
            raise error

        return make

    found.append(from_first_rank(only_first))
    for error in (ValueError("max_tokens=0 must be 1"), FileNotFoundError("no folder x")):
        try:
            from_first_rank(broken(error))
        except (ValueError, OSError) as raised:
            found.append((type(raised), str(raised)))
    found.append(from_first_rank(lambda: "and goes on"))
    return [*found, gather_objects(wire.axis.rank, wire.axis)]


@pytest.mark.parametrize("size", [1, 3])
def test_what_rank_0_makes_or_raises_is_made_or_raised_everywhere(size: int) -> None:
    want = [
        "made by 0",
        (ValueError, "max_tokens=0 must be 1"),
        (FileNotFoundError, "no folder x"),
        "and goes on",
        list(range(size)),
    ]
    assert run_ranks(size, agreements) == [want] * size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("d", [1, 4])
def test_typed_rows_are_views_unless_a_row_begins_between_two_numbers(
    d: int, heads: int, dtype: torch.dtype
) -> None:
    cut = heads * d * dtype.itemsize
    rows = torch.randint(256, (2, 5, cut + 4 * heads), dtype=torch.uint8)
    for part, kind in ((rows[..., :cut], dtype), (rows[..., cut:], torch.float32)):
        typed = typed_rows(part, kind)
        assert torch.equal(typed.contiguous().view(torch.uint8), part)
        fits = rows.shape[-1] % kind.itemsize == 0 and part.storage_offset() % kind.itemsize == 0
        assert (typed.data_ptr() == part.data_ptr()) == fits
