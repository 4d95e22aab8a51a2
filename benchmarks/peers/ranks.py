"""A driver that is rank 0 of a small gloo world: starts the other ranks and tells them what to do next.

One thread each; a rank that waits sleeps. Knows torch.distributed, no engine.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Ranks wait while other peers have their turn.
PATIENCE = timedelta(hours=6)


def become_rank_0(size: int, follow: Callable[..., None], *args: Any) -> None:
    """This process is rank 0 from here on; each other rank is a process in `follow(*args)`, ended with us."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ["OMP_NUM_THREADS"] = "1"  # for the other ranks; this process has read it already
    store = tempfile.mktemp(prefix="peers-")
    context = multiprocessing.get_context("spawn")
    for rank in range(1, size):
        context.Process(target=_rank, args=(rank, size, store, follow, args), daemon=True).start()
    _join(0, size, store)


def tell(message: Any) -> None:
    """Rank 0: to all others."""
    dist.broadcast_object_list([message], src=0)


def hear() -> Any:
    """The others: what rank 0 tells next."""
    message = [None]
    dist.broadcast_object_list(message, src=0)
    return message[0]


def _rank(rank: int, size: int, store: str, follow: Callable[..., None], args: tuple[Any, ...]) -> None:
    _join(rank, size, store)
    follow(*args)


def _join(rank: int, size: int, store: str) -> None:
    torch.set_num_threads(1)
    _bind(rank, size)
    place = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in place.items()})
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=PATIENCE
    )


def _bind(rank: int, size: int) -> None:
    """A rank keeps cores of its own, as our launchers and vLLM on CPU do; needs Linux and enough cores."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if share := len(cores) // size:
        os.sched_setaffinity(0, cores[rank * share : (rank + 1) * share])
