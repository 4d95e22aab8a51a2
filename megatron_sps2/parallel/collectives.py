"""Collectives between sequence and head layouts, and the small ones of a decode step.

Every one is named by what it does to the layout and books its bytes in the ledger. Asynchronous: each returns
a Handle that is waited for once. Knows groups, not models.
"""

from __future__ import annotations

import contextlib
import math
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sps2.parallel.activity import Activity
from megatron_sps2.parallel.groups import Axis, world_axis
from megatron_sps2.parallel.ledger import Ledger
from megatron_sps2.parallel.mailbox import Mailbox
from megatron_sps2.parallel.shared_error import mark_shared
from megatron_sps2.parallel.trace import Trace

T = TypeVar("T")

# A plan of usual size travels in one message: its length and this many bytes.
PLAN_BYTES = 8192


class Work(Protocol):
    """A transfer under way."""

    def wait(self) -> object: ...


@dataclass(frozen=True, slots=True)
class Wire:
    """An axis to send over and the ledger to book it in; small messages may go by `mailbox`."""

    axis: Axis
    ledger: Ledger
    mailbox: Mailbox | None = None

    def for_messages(self, num_bytes: int) -> Wire:
        """The wire for messages of at most `num_bytes`, a number that all ranks know alike."""
        fits = self.mailbox and num_bytes <= self.mailbox.slot_bytes
        return self if fits else replace(self, mailbox=None)


class Handle(Generic[T]):
    """A collective under way. Keeps its buffers alive until `wait`, which gives the result."""

    def __init__(
        self,
        received: Tensor,
        finish: Callable[[Tensor], T],
        work: Work | None,
        sent: Tensor,
        done: Callable[[], None] | None = None,
        activity: Activity | None = None,
    ) -> None:
        """`done` is called when everything has arrived; `activity` says meanwhile that this rank waits."""
        self._received, self._finish, self._work, self._sent = received, finish, work, sent
        self._done, self._activity = done, activity

    def wait(self) -> T:
        """Call once, in the function that holds the handle."""
        if self._work is not None:
            with self._activity.waiting() if self._activity else contextlib.nullcontext():
                self._work.wait()
        if self._done is not None:
            self._done()
        result = self._finish(self._received)
        del self._sent, self._received
        return result


def all_to_all(
    wire: Wire, name: str, parts: Sequence[Tensor], recv_numels: Sequence[int], finish: Callable[[Tensor], T]
) -> Handle[T]:
    """Part p goes to rank p of the axis; `finish` shapes the flat tensor of what came, rank after rank.

    recv_numels[p] elements come from rank p. A part may be empty.
    """
    numels = [part.numel() for part in parts]
    return send_packed(
        wire, name, torch.cat([part.reshape(-1) for part in parts]), numels, recv_numels, finish
    )


def send_packed(
    wire: Wire,
    name: str,
    send: Tensor,
    numels: Sequence[int],
    recv_numels: Sequence[int],
    finish: Callable[[Tensor], T],
) -> Handle[T]:
    """`all_to_all` of parts that lie one after another: the next numels[p] of flat `send` go to rank p.

    Nothing may write to `send` before the handle has been waited for.
    """
    axis = wire.axis
    if axis.size == 1:
        return Handle(send, finish, None, send)
    wire.ledger.add(name, (sum(numels) - numels[axis.rank]) * send.element_size())
    # gloo fills a non-contiguous output wrongly and says nothing: always a fresh one.
    received = send.new_empty(sum(recv_numels))
    work: Work
    if wire.mailbox:
        work = wire.mailbox.exchange(send, numels, received, recv_numels)
    else:
        work = dist.all_to_all_single(
            received, send, list(recv_numels), list(numels), group=axis.group, async_op=True
        )
    return Handle(received, finish, work, send, _traced(wire.ledger.trace, name), wire.ledger.activity)


def _traced(trace: Trace | None, name: str) -> Callable[[], None] | None:
    """What a handle calls when it is done: it books the time from now until then."""
    if trace is None:
        return None
    start = trace.now()
    return lambda: trace.add(name, "collectives", start)


def seq_to_heads(
    x: Tensor, wire: Wire, tokens: Sequence[int], heads: Sequence[tuple[int, int]], name: str = "seq_to_heads"
) -> Handle[Tensor]:
    """[s/P, b, n, d] -> [s, b, n/P, d]; tokens[r] lie on rank r, rank p gets heads[p] = (start, stop).

    Uneven and empty ranges are allowed, and ranges may overlap (a KV head that several ranks read).
    """
    me = wire.axis.rank
    _, b, _, d = x.shape
    num_heads = heads[me][1] - heads[me][0]
    if wire.axis.size == 1:
        return Handle(x[:, :, slice(*heads[0])], _as_is, None, x)
    recv = [count * b * num_heads * d for count in tokens]
    return all_to_all(
        wire,
        name,
        [x[:, :, start:stop] for start, stop in heads],
        recv,
        lambda flat: flat.view(sum(tokens), b, num_heads, d),
    )


def heads_to_seq(
    x: Tensor, wire: Wire, tokens: Sequence[int], num_heads: Sequence[int]
) -> Handle[list[Tensor]]:
    """[s, b, n/P, d] -> P tensors [s/P, b, n_p, d]: this rank's tokens, with the heads that rank p had."""
    _, b, _, d = x.shape
    mine = tokens[wire.axis.rank]
    if wire.axis.size == 1:
        return Handle(x, lambda whole: [whole], None, x)
    recv = [mine * b * count * d for count in num_heads]

    def finish(flat: Tensor) -> list[Tensor]:
        pieces = flat.split(recv)
        return [piece.view(mine, b, count, d) for piece, count in zip(pieces, num_heads, strict=True)]

    return all_to_all(wire, "heads_to_seq", x.split(list(tokens)), recv, finish)


def gather_tokens(x: Tensor, wire: Wire, tokens: Sequence[int], name: str) -> Handle[Tensor]:
    """[s/P, ...] -> [s, ...], rank after rank: every rank gets all tokens. Uneven and empty shards allowed.

    An all-to-all of one tensor to everybody: unlike all-gather it takes uneven shards without padding.
    """
    if wire.axis.size == 1:
        return Handle(x, _as_is, None, x)
    row = x.shape[1:].numel()
    parts = [x if rank != wire.axis.rank else x[:0] for rank in range(wire.axis.size)]
    recv = [count * row for count in tokens]
    recv[wire.axis.rank] = 0

    def finish(flat: Tensor) -> Tensor:
        # The own shard need not pass through the collective: it is put in its place here.
        pieces = [
            piece.view(count, *x.shape[1:]) if rank != wire.axis.rank else x
            for rank, (piece, count) in enumerate(zip(flat.split(recv), tokens, strict=True))
        ]
        return torch.cat(pieces)

    return all_to_all(wire, name, parts, recv, finish)


def return_partials(
    out: Tensor, lse: Tensor, wire: Wire, tokens: Sequence[int], name: str = "return_partials"
) -> Handle[tuple[Tensor, Tensor]]:
    """out [s, ..., n, d], lse [s, ..., n] fp32 -> [P, s/P, ..., n, d], [P, s/P, ..., n] of my tokens.

    tokens[r] of the s rows are at home on rank r. One message: LSE travels as fp32 bytes beside outputs. What
    comes is given where it lies: rows of outs and lses are views into the message.
    """
    if wire.axis.size == 1:
        return Handle(out, lambda whole: (whole[None], lse[None]), None, out)
    mine, size = tokens[wire.axis.rank], wire.axis.size
    out_row, lse_row = out.shape[1:], lse.shape[1:]
    out_bytes, lse_bytes = out_row.numel() * out.element_size(), lse_row.numel() * lse.element_size()

    def as_bytes(rows: Tensor, width: int) -> Tensor:
        return rows.contiguous().view(torch.uint8).view(len(rows), width)

    packed = torch.cat([as_bytes(out, out_bytes), as_bytes(lse, lse_bytes)], dim=1)
    row = out_bytes + lse_bytes

    def finish(flat: Tensor) -> tuple[Tensor, Tensor]:
        rows = flat.view(size, mine, row)
        outs = typed_rows(rows[..., :out_bytes], out.dtype)
        lses = typed_rows(rows[..., out_bytes:], lse.dtype)
        return outs.view(size, mine, *out_row), lses.view(size, mine, *lse_row)

    sent = [count * row for count in tokens]
    return send_packed(wire, name, packed.view(-1), sent, [mine * row] * size, finish)


def typed_rows(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes [..., n * itemsize] -> [..., n] of `dtype`: a view, unless a row begins between two numbers."""
    places = (rows.storage_offset(), *rows.stride()[:-1])
    if any(place % dtype.itemsize for place in places):
        rows = rows.contiguous()
    return rows.view(dtype)


def gather_vocab(logits: Tensor, wire: Wire) -> Tensor:
    """[..., v/T] -> [..., v] on every tp rank; shards are equally large."""
    size = wire.axis.size
    shards = gather_tokens(logits.reshape(1, -1), wire, [1] * size, "gather_vocab").wait()
    return torch.cat([shard.view_as(logits) for shard in shards], dim=-1)


def route_rows(
    x: Tensor, wire: Wire, sent: Sequence[int], received: Sequence[int], name: str
) -> Handle[Tensor]:
    """[sum(sent), ...] -> [sum(received), ...]: the next sent[p] rows go to rank p, received[p] come.

    Nothing may write to x before the handle has been waited for.
    """
    row = x.shape[1:]
    numels, recv = ([count * row.numel() for count in counts] for counts in (sent, received))
    return send_packed(wire, name, x.reshape(-1), numels, recv, lambda flat: flat.view(sum(received), *row))


def exchange_lists(
    wire: Wire,
    name: str,
    outgoing: Sequence[Sequence[Tensor]],
    shapes: Sequence[Sequence[tuple[int, ...]]],
    like: Tensor,
) -> Handle[list[list[Tensor]]]:
    """outgoing[p] to rank p -> tensors of shapes[p] from rank p, for every p; what stays here is not copied.

    All have the dtype and device of `like`. Every rank knows beforehand what each other will send it.
    """
    me = wire.axis.rank
    parts = [
        torch.cat([x.reshape(-1) for x in tensors]) if tensors and rank != me else like.new_empty(0)
        for rank, tensors in enumerate(outgoing)
    ]
    numels = [
        [math.prod(shape) for shape in expected] if rank != me else [] for rank, expected in enumerate(shapes)
    ]

    def finish(flat: Tensor) -> list[list[Tensor]]:
        pieces = [
            piece.split(sizes)
            for piece, sizes in zip(flat.split(list(map(sum, numels))), numels, strict=True)
        ]
        return [
            list(outgoing[me])
            if rank == me
            else [x.view(shape) for x, shape in zip(pieces[rank], shapes[rank], strict=True)]
            for rank in range(wire.axis.size)
        ]

    return all_to_all(wire, name, parts, list(map(sum, numels)), finish)


def broadcast_plan(plan: Any, wire: Wire, device: torch.device) -> Any:
    """Rank 0's plain-data `plan` on every rank; others pass None. One message unless it is large."""
    axis = wire.axis
    if axis.size == 1:
        return plan
    head = torch.zeros(8 + PLAN_BYTES, dtype=torch.uint8, device=device)
    body = b""
    if axis.rank == 0:
        body = pickle.dumps(plan)
        first = len(body).to_bytes(8, "little") + body[:PLAN_BYTES]
        head[: len(first)] = torch.frombuffer(bytearray(first), dtype=torch.uint8)
    dist.broadcast(head, src=axis.ranks[0], group=axis.group)
    length = int.from_bytes(bytes(head[:8].tolist()), "little")
    rest = torch.empty(max(0, length - PLAN_BYTES), dtype=torch.uint8, device=device)
    if len(rest):
        if axis.rank == 0:
            rest.copy_(torch.frombuffer(bytearray(body[PLAN_BYTES:]), dtype=torch.uint8))
        dist.broadcast(rest, src=axis.ranks[0], group=axis.group)
    if axis.rank == 0:
        wire.ledger.add("broadcast_plan", (len(head) + len(rest)) * (axis.size - 1))
        return plan
    return pickle.loads(
        head[8 : 8 + min(length, PLAN_BYTES)].cpu().numpy().tobytes() + rest.cpu().numpy().tobytes()
    )


def gather_objects(value: T, axis: Axis) -> list[T]:
    """`value` of every rank of the axis, on every rank. For start and end, never inside a step."""
    if axis.size == 1:
        return [value]
    values: list[Any] = [None] * axis.size
    dist.all_gather_object(values, value, group=axis.group)
    return values


def agree(check: Callable[[], T]) -> T:
    """`check()`, unless it finds a user's mistake on any rank: then it raises on all, the first rank's first.

    Collective over the world, so that no rank waits for one that has given up.
    """
    problem: Exception | None = None
    try:
        result = check()
    except (ValueError, OSError) as error:
        # Built anew from its text: a subclass with more inside may not survive the journey.
        kinds = (FileNotFoundError, OSError, ValueError)
        problem = next(kind for kind in kinds if isinstance(error, kind))(str(error))
    for rank, found in enumerate(gather_objects(problem, world_axis())):
        if found is not None:
            leave_together()
            raise mark_shared(type(found)(str(found) if rank == 0 else f"rank {rank}: {found}"))
    return result


def tell_all(problem: str, axis: Axis) -> None:
    """Raises RuntimeError on every rank of `axis` where any has a problem, the first one's; "" is none.

    Collective.
    """
    for rank, found in enumerate(gather_objects(problem, axis)):
        if found:
            leave_together()
            raise mark_shared(RuntimeError(f"rank {rank}: {found}"))


def from_first_rank(make: Callable[[], T]) -> T:
    """`make()` of world rank 0 on every rank. What it raises for a user's mistake is raised on every rank."""
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = make()
        except (ValueError, OSError) as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        leave_together()
        raise mark_shared(box[1])
    value: T = box[0]
    return value


def leave_together() -> None:
    """Before all ranks raise alike: one that ends first would break a collective others are still in."""
    with contextlib.suppress(RuntimeError):  # A rank that is gone has told why.
        dist.barrier()


def _as_is(x: Tensor) -> Tensor:
    return x
