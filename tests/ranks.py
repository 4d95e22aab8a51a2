"""Runs a function on several gloo ranks and brings back what each returned.

Ranks come from a forkserver that has torch and Megatron loaded, which starts them in tenths of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

# transformers too, as many test modules import it and ranks import those: 1.5 s for each rank.
_PRELOAD = [
    "megatron_sps2.cli.preload",
    "pytest",
    "transformers.models.llama.modeling_llama",
]
COLLECTIVE_TIMEOUT_S = 120


class RankFailed(AssertionError):
    """A rank raised or died; the message names the rank and holds its traceback."""


def run_ranks(world_size: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 240) -> list[Any]:
    """[fn(*args) on rank r for r in range(world_size)], inside an initialised gloo world.

    `fn` must be importable from a test module. Raises RankFailed as soon as one rank fails.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        pipes, ranks = [], []
        for rank in range(world_size):
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank_main, args=(sender, rank, world_size, f"{folder}/store", fn, args), daemon=True
            )
            process.start()
            sender.close()
            pipes.append(receiver)
            ranks.append(process)
        try:
            return _collect(pipes, ranks, time.monotonic() + timeout_s)
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _collect(pipes: list[Connection], ranks: list[Any], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        pending = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailed(f"ranks {sorted(set(range(len(pipes))) - set(results))} gave no answer in time")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                failed, results[rank] = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]
            except EOFError:
                ranks[rank].join(5)
                raise RankFailed(f"rank {rank} died, exit code {ranks[rank].exitcode}") from None
            if failed:
                raise RankFailed(f"rank {rank} raised:\n{results[rank]}")
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(
    pipe: Connection, rank: int, world_size: int, store: str, fn: Callable[..., Any], args: tuple[Any, ...]
) -> None:
    import torch
    import torch.distributed as dist

    # Threads that wait for each other beside another worker's tests spin, and all become much slower.
    beside_others = world_size > 1 or "PYTEST_XDIST_WORKER" in os.environ
    torch.set_num_threads(1 if beside_others else 2)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{store}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
        )
        result = (False, fn(*args))
    except BaseException:
        result = (True, traceback.format_exc())
    # Plain pickle copies tensors; the pipe's own would share memory that dies with this process.
    pipe.send_bytes(pickle.dumps(result))
    pipe.close()
    # The parent ends it once all have answered: others may still be connecting to this one. No teardown:
    # peers of a failed rank may never answer.
    multiprocessing.parent_process().join()  # type: ignore[union-attr]
    os._exit(1)
