"""What is measured between ranks before a job: who reaches whom, latency, bandwidth, clocks.

Knows groups and tensors, not models; judges nothing. Every function is collective over its axis.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sps2.parallel.collectives import gather_objects
from megatron_sps2.parallel.groups import Axis

NUM_PINGS, NUM_SMALL, NUM_LARGE = 20, 50, 3
WARM_UP = 3
MEGABYTE = 1e6
# A pair's own message at most: pairs take turns, and their number grows with the square of the ranks'.
PAIR_BYTES = 4_000_000
# Beyond so many ranks only the pairs with rank 0 are measured: NCCL keeps buffers for every pair it has seen.
MAX_PAIRED_RANKS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Of an all-to-all as one rank saw it: a small one's time, and what this rank sent of a large one."""

    latency_us: float
    mb_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """Two ranks: half a round trip, a large message's speed, and the second one's clock less the first's."""

    ranks: tuple[int, int]
    latency_us: float
    mb_per_s: float
    offset_ms: float
    plus_minus_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Clock:
    """A rank's wall clock less rank 0's, known to half a round trip."""

    rank: int
    offset_ms: float
    plus_minus_ms: float


def unreached(axis: Axis, device: str) -> list[int]:
    """World ranks whose message to this rank did not arrive as it was sent."""
    me, size = axis.rank, axis.size
    sent = torch.arange(me * size, (me + 1) * size, dtype=torch.int64, device=device)
    received = torch.full_like(sent, -1)
    dist.all_to_all_single(received, sent, group=axis.group)
    return [axis.ranks[p] for p, value in enumerate(received.tolist()) if value != p * size + me]


def measure_axis(axis: Axis, device: str, num_bytes: int) -> Speed:
    """All-to-alls of one element to each rank, and of `num_bytes` that a rank has for all."""
    small, numel = torch.zeros(2, axis.size, device=device), max(1, num_bytes // 4 // axis.size)
    large = torch.zeros(2, numel * axis.size, device=device)
    latencies = [_time_exchange(axis, *small) for _ in range(WARM_UP + NUM_SMALL)][WARM_UP:]
    best = min(_time_exchange(axis, *large) for _ in range(1 + NUM_LARGE))
    sent = 4 * numel * (axis.size - 1)
    return Speed(latency_us=1e6 * statistics.median(latencies), mb_per_s=sent / best / MEGABYTE)


def _time_exchange(axis: Axis, x: Tensor, received: Tensor) -> float:
    dist.barrier(axis.group)
    start = time.perf_counter()
    dist.all_to_all_single(received, x, group=axis.group)
    received[0].item()  # waits for a device
    return time.perf_counter() - start


def measure_pairs(axis: Axis, device: str, num_bytes: int, name: Callable[[int], str]) -> list[Pair]:
    """Of each two ranks, or of rank 0 and each other one; the whole list on every rank.

    `name` says which rank a message speaks of. Raises RuntimeError naming two ranks that lose each other.
    """
    if dist.get_backend(axis.group) == "gloo":
        device = "cpu"  # Its send and recv read a device's address as one of the host's memory.
    mine = []
    for meetings in rounds(axis.size):
        dist.barrier(axis.group)
        for meeting in meetings:
            if axis.rank in meeting:
                mine.append(_measure_pair(axis, meeting, device, min(num_bytes, PAIR_BYTES), name))
    everybody = [pair for pairs in gather_objects(mine, axis) for pair in pairs if pair is not None]
    return sorted(everybody, key=lambda pair: pair.ranks)


def rounds(size: int) -> list[list[tuple[int, int]]]:
    """Each two of `size` ranks meet once; in a round no rank has two meetings. As in a chess tournament."""
    if size > MAX_PAIRED_RANKS:
        return [[(0, rank)] for rank in range(1, size)]
    seats: list[int | None] = [*range(size), *([None] if size % 2 else [])]
    found = []
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        met = zip(seats[:half], reversed(seats[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in met if a is not None and b is not None])
        seats = [seats[0], seats[-1], *seats[1:-1]]
    return found


def _measure_pair(
    axis: Axis, pair: tuple[int, int], device: str, num_bytes: int, name: Callable[[int], str]
) -> Pair | None:
    """On both ranks of `pair`, places on the axis; the first one's is the result."""
    leads, other = axis.rank == pair[0], pair[axis.rank == pair[0]]
    try:
        pings = _ping(axis, other, device, leads)
        large = torch.zeros(max(1, num_bytes // 4), device=device)
        trips = [_time_trip(axis, other, large, leads) for _ in range(1 + NUM_LARGE)]
    except RuntimeError as error:
        raise RuntimeError(
            f"{name(axis.ranks[axis.rank])} and {name(axis.ranks[other])} lost each other "
            f"({str(error).splitlines()[0]}); every rank must reach every other one: look at the network and "
            "the firewall between them"
        ) from error
    if not leads:
        return None
    trip, offset = min(pings)
    return Pair(
        ranks=(axis.ranks[pair[0]], axis.ranks[pair[1]]),
        latency_us=1e6 * statistics.median(trip for trip, _ in pings) / 2,
        mb_per_s=2 * 4 * len(large) / min(trips) / MEGABYTE,
        offset_ms=1e3 * offset,
        plus_minus_ms=1e3 * trip / 2,
    )


def _ping(axis: Axis, other: int, device: str, leads: bool) -> list[tuple[float, float]]:
    """(round trip, the other's clock less this one's at its middle) in seconds, for each ping.

    The shortest trip knows the clocks best: they differ by its offset, half the trip more or less.
    """
    clock, found = torch.zeros(1, dtype=torch.float64, device=device), []
    for _ in range(WARM_UP + NUM_PINGS):
        here = time.time()
        trip = _time_trip(axis, other, clock, leads, stamp=True)
        found.append((trip, clock.item() - (here + trip / 2)))
    return found[WARM_UP:]


def _time_trip(axis: Axis, other: int, x: Tensor, leads: bool, stamp: bool = False) -> float:
    """`x` to the other rank and back; with `stamp` it brings that one's clock."""
    peer, start = axis.ranks[other], time.perf_counter()
    if leads:
        dist.send(x, peer, group=axis.group)
        dist.recv(x, peer, group=axis.group)
    else:
        dist.recv(x, peer, group=axis.group)
        if stamp:
            x[0].item()  # over NCCL it is not there yet
            x.fill_(time.time())
        dist.send(x, peer, group=axis.group)
    x[0].item()  # waits for a device
    return time.perf_counter() - start


def clocks(pairs: Sequence[Pair]) -> list[Clock]:
    """Of every rank but 0, from its pair with rank 0."""
    return [
        Clock(rank=pair.ranks[1], offset_ms=pair.offset_ms, plus_minus_ms=pair.plus_minus_ms)
        for pair in pairs
        if pair.ranks[0] == 0
    ]
