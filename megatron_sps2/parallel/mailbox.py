"""Small all-to-alls between CPU ranks of one host through shared memory.

A gloo collective changes threads five times, a quarter of a millisecond, and a decode step has two a layer;
here a message costs microseconds. Knows bytes and processes, not what they mean.
"""

from __future__ import annotations

import mmap
import os
import platform
import secrets
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from megatron_sps2.parallel.groups import Axis

# Messages of one axis together; a slot holds the largest message from one rank to another.
MEMORY_BYTES = 32 << 20
LARGEST_SLOT_BYTES = 1 << 20
# Exchange t starts when all up to t - MAX_UNDER_WAY have been waited for. Each waits for all peers, so no
# rank is further ahead of another than that, and a message is read before another one takes its slot.
MAX_UNDER_WAY = 4
NUM_SLOTS = 2 * MAX_UNDER_WAY
CACHE_LINE = 64
SPIN_S = 2e-3  # longer waits sleep between looks
SLEEP_S = 5e-5
CHECK_S = 0.5


Gather = Callable[[Any], list[Any]]  # a value of every rank of the axis, on every rank


class PeerLost(RuntimeError):
    """A rank of the axis ended, or did not answer in time."""


@dataclass(slots=True)
class _Exchange:
    """One all-to-all under way; `wait` fills the received tensor."""

    mailbox: Mailbox
    number: int
    received: Tensor
    recv_numels: Sequence[int]

    def wait(self) -> None:
        self.mailbox._receive(self)


class Mailbox:
    """A slot for each (sender, receiver), which a sequence number says is full. Use `open_mailbox`."""

    def __init__(
        self, axis: Axis, memory: mmap.mmap, pids: Sequence[int], timeout_s: float, spin_s: float
    ) -> None:
        self._axis, self._pids, self._timeout_s, self._spin_s = axis, pids, timeout_s, spin_s
        self.slot_bytes = slot_bytes(axis.size)
        self._sent = 0
        self._under_way: set[int] = set()
        flags = axis.size * axis.size * CACHE_LINE
        whole = np.frombuffer(memory, dtype=np.uint8)
        # One number per cache line: two cores never write to the same one.
        self._full = whole[:flags].view(np.int64).reshape(axis.size, axis.size, -1)[:, :, 0]
        self._slots = whole[flags:].reshape(axis.size, axis.size, NUM_SLOTS, self.slot_bytes)

    def exchange(
        self, send: Tensor, numels: Sequence[int], received: Tensor, recv_numels: Sequence[int]
    ) -> _Exchange:
        """send, flat: the next numels[p] go to rank p; `wait` fills `received`, rank by rank."""
        me, slot = self._axis.rank, self._sent % NUM_SLOTS
        self._sent += 1
        self._under_way.add(self._sent)
        assert self._sent - min(self._under_way) < MAX_UNDER_WAY, f"exchanges under way: {self._under_way}"
        for peer, part in enumerate(send.split(list(numels))):
            if peer != me:
                self._slots[me, peer, slot, : part.nbytes] = part.view(torch.uint8).numpy()
                # x86 makes stores visible in order: whoever sees the number sees the message.
                self._full[me, peer] = self._sent
        own = send.split(list(numels))[me]
        received.split(list(recv_numels))[me].copy_(own)
        return _Exchange(self, self._sent, received, recv_numels)

    def _receive(self, exchange: _Exchange) -> None:
        me, slot = self._axis.rank, (exchange.number - 1) % NUM_SLOTS
        for peer, part in enumerate(exchange.received.split(list(exchange.recv_numels))):
            if peer != me:
                self._await(peer, exchange.number)
                part.view(torch.uint8).numpy()[:] = self._slots[peer, me, slot, : part.nbytes]
        self._under_way.discard(exchange.number)

    def _await(self, peer: int, number: int) -> None:
        column = self._full[:, self._axis.rank]
        if column[peer] >= number:
            return
        start = checked = time.monotonic()
        while column[peer] < number:
            now = time.monotonic()
            if now - start < self._spin_s:
                os.sched_yield()
            else:
                time.sleep(SLEEP_S)
            if now - checked > CHECK_S:
                checked = now
                self._check(peer, now - start)

    def _check(self, peer: int, waited_s: float) -> None:
        lost = [rank for rank, pid in enumerate(self._pids) if not _is_alive(pid)]
        if lost:
            gone = ", ".join(f"rank {self._axis.ranks[rank]} (pid {self._pids[rank]})" for rank in lost)
            me = self._axis.ranks[self._axis.rank]
            raise PeerLost(f"{gone} ended while rank {me} waited for its message")
        if waited_s > self._timeout_s:
            silent = f"rank {self._axis.ranks[peer]} (pid {self._pids[peer]})"
            raise PeerLost(f"{silent} sent nothing for {self._timeout_s:.0f} s")


def slot_bytes(num_ranks: int) -> int:
    """The largest message, a multiple of a cache line, such that all slots fit MEMORY_BYTES."""
    share = MEMORY_BYTES // (num_ranks * num_ranks * NUM_SLOTS)
    return min(LARGEST_SLOT_BYTES, share // CACHE_LINE * CACHE_LINE)


def open_mailbox(axis: Axis, gather: Gather, timeout_s: float, num_local_ranks: int) -> Mailbox | None:
    """A mailbox for the axis; None where it cannot be: one rank, several hosts, not x86 Linux. Collective."""
    on_x86 = sys.platform == "linux" and platform.machine().lower() in ("x86_64", "amd64")
    hosts = gather((socket.gethostname(), on_x86, os.getpid()))
    if axis.size == 1 or len({host for host, *_ in hosts}) > 1 or not all(ok for _, ok, _ in hosts):
        return None
    size = axis.size * axis.size * (CACHE_LINE + NUM_SLOTS * slot_bytes(axis.size))
    token = secrets.token_bytes(16)
    file = _create(size, token) if axis.rank == 0 else None
    path = f"/proc/{os.getpid()}/fd/{file.fileno()}" if file else None
    path, token = gather((path, token))[0]
    memory = _map(path, size, token)
    usable = all(gather(memory is not None))
    if file:
        file.close()  # Mapped by all; the memory goes with the last of them.
    if not usable or memory is None:
        return None
    memory[: len(token)] = bytes(len(token))
    gather(None)  # Nobody writes before all have cleared.
    # Where ranks outnumber cores, a rank that spins keeps the one it waits for from running.
    spin_s = SPIN_S if num_local_ranks <= len(os.sched_getaffinity(0)) else 0.0
    return Mailbox(axis, memory, [pid for *_, pid in hosts], timeout_s, spin_s)


def _create(size: int, token: bytes) -> BinaryIO | None:
    """A file in memory that begins with `token` and has no name, so that it cannot outlive its processes."""
    try:
        file = tempfile.TemporaryFile(dir="/dev/shm")  # noqa: SIM115 (open until all ranks have mapped it)
        file.write(token)
        file.flush()
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError:
        return None
    return file


def _map(path: str | None, size: int, token: bytes) -> mmap.mmap | None:
    """The shared file, if it is the one that rank 0 made."""
    try:
        if path is None:
            return None
        with open(path, "r+b") as file:
            memory = mmap.mmap(file.fileno(), size)
    except (OSError, ValueError):
        return None
    return memory if memory[: len(token)] == token else None


def _is_alive(pid: int) -> bool:
    """False for a process that is gone or a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
