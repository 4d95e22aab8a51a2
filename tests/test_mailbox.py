"""The shared-memory exchange of small messages, beside gloo and with ranks that end."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sps2.config import ParallelConfig
from megatron_sps2.parallel.collectives import Wire, gather_objects, gather_tokens, route_rows
from megatron_sps2.parallel.groups import Axis, ParallelGroups
from megatron_sps2.parallel.ledger import Ledger
from megatron_sps2.parallel.mailbox import LARGEST_SLOT_BYTES, Mailbox, PeerLost, open_mailbox, slot_bytes
from tests.broken_wire import exchange_skipped
from tests.ranks import run_ranks


def open_on_world(timeout_s: float = 20.0) -> tuple[Axis, Mailbox | None]:
    axis = ParallelGroups.create(ParallelConfig(sp_size=dist.get_world_size())).sp
    return axis, open_mailbox(axis, lambda value: gather_objects(value, axis), timeout_s, axis.size)


def exchange_at_random(wire: Wire, rounds: int, dtype: torch.dtype) -> list[Tensor]:
    """Rounds of two overlapping exchanges with sizes that change, some of them empty."""
    size, me, results = wire.axis.size, wire.axis.rank, []
    generator = torch.Generator().manual_seed(7)  # the same sizes on every rank
    for number in range(rounds):
        counts = torch.randint(0, 4, (size,), generator=generator).tolist()
        table = torch.randint(0, 3, (size, size), generator=generator)
        x = torch.arange(counts[me] * 6).reshape(counts[me], 2, 3) + 30 * me + number
        first = gather_tokens(x.to(dtype), wire, counts, "gather")
        rows = torch.full((int(table[me].sum()), 5), (me + 10 * number) % 251, dtype=dtype)
        second = route_rows(rows, wire, table[me].tolist(), table[:, me].tolist(), "route")
        results += [second.wait(), first.wait()]
    return results


def differs_from_gloo(skipped: bool) -> bool:
    axis, mailbox = open_on_world()
    assert mailbox is not None, "ranks of one host have a mailbox"
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.uint8):
        by_gloo = exchange_at_random(Wire(axis, Ledger()), 60, dtype)
        with exchange_skipped(skipped):
            by_mail = exchange_at_random(Wire(axis, Ledger(), mailbox), 60, dtype)
        if not all(map(torch.equal, by_mail, by_gloo)):
            return True
    return False


@pytest.mark.parametrize("size", [2, 3, 4])
def test_mail_brings_what_gloo_brings(size: int) -> None:
    assert run_ranks(size, differs_from_gloo, False) == [False] * size


def test_control_without_the_exchange_it_differs() -> None:
    assert any(run_ranks(2, differs_from_gloo, True))


def is_none() -> bool:
    return open_on_world()[1] is None


def test_a_rank_alone_has_no_mailbox() -> None:
    assert run_ranks(1, is_none) == [True]


def test_large_messages_go_by_the_group() -> None:
    mailbox = Mailbox.__new__(Mailbox)
    mailbox.slot_bytes = slot_bytes(2)
    wire = Wire(Axis(None, 0, 2, (0, 1)), Ledger(), mailbox)  # type: ignore[arg-type]
    assert wire.for_messages(slot_bytes(2)).mailbox is mailbox
    assert wire.for_messages(slot_bytes(2) + 1).mailbox is None


def test_slots_shrink_as_ranks_grow_in_number() -> None:
    assert [slot_bytes(size) for size in (2, 4, 8)] == [LARGEST_SLOT_BYTES, 1 << 18, 1 << 16]


def too_many_under_way() -> bool:
    axis, mailbox = open_on_world()
    wire = Wire(axis, Ledger(), mailbox)
    handles = [gather_tokens(torch.ones(1, 4), wire, [1, 1], "x") for _ in range(4)]
    with pytest.raises(AssertionError, match="under way"):
        gather_tokens(torch.ones(1, 4), wire, [1, 1], "x")
    return all(bool(handle.wait().sum() == 8) for handle in handles)


def test_more_exchanges_under_way_than_slots_allow_are_refused() -> None:
    assert run_ranks(2, too_many_under_way) == [True, True]


def one_ends() -> float:
    """Rank 1 returns at once, and its process ends soon after; rank 0 waits for a message from it."""
    axis, mailbox = open_on_world()
    start = time.monotonic()
    if axis.rank == 1:
        threading.Timer(1.0, os._exit, (0,)).start()
    else:
        with pytest.raises(PeerLost, match=r"rank 1 \(pid \d+\) ended while rank 0 waited"):
            gather_tokens(torch.ones(1, 4), Wire(axis, Ledger(), mailbox), [1, 1], "x").wait()
    return time.monotonic() - start


def test_a_rank_that_ends_is_noticed_within_seconds() -> None:
    assert run_ranks(2, one_ends)[0] < 10


def one_is_silent() -> bool:
    axis, mailbox = open_on_world(timeout_s=1.0)
    if axis.rank == 1:
        time.sleep(4)
        return True
    with pytest.raises(PeerLost, match="rank 1 .* sent nothing for 1 s"):
        gather_tokens(torch.ones(1, 4), Wire(axis, Ledger(), mailbox), [1, 1], "x").wait()
    return True


def test_a_rank_that_is_silent_is_given_up_after_the_timeout() -> None:
    assert run_ranks(2, one_is_silent) == [True, True]
