"""A decode step's gather of queries, by shared memory beside gloo: python -m benchmarks.exchange

Both take turns on the same ranks in one run, one thread each; 9 heads of 64 in fp32, one token a rank.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import os
import statistics
import tempfile
import time
from datetime import timedelta

import torch

from megatron_sps2.config import ParallelConfig
from megatron_sps2.parallel.collectives import Wire, gather_objects, gather_tokens
from megatron_sps2.parallel.groups import ParallelGroups
from megatron_sps2.parallel.ledger import Ledger
from megatron_sps2.parallel.mailbox import open_mailbox
from megatron_sps2.parallel.rank_env import RankEnv, init_process_group

ROUNDS, GATHERS = 10, 300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sp", type=int, nargs="+", default=[2, 4])
    args = parser.parse_args()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    print("| ranks | gloo, us | shared memory, us | ratio |\n|---|---|---|---|", flush=True)
    context = multiprocessing.get_context("forkserver")
    for size in args.sp:
        with tempfile.TemporaryDirectory() as folder:
            ranks = [context.Process(target=_rank, args=(r, size, f"file://{folder}/s")) for r in range(size)]
            for rank in ranks:
                rank.start()
            for rank in ranks:
                rank.join()


def _rank(rank: int, size: int, init_method: str) -> None:
    torch.set_num_threads(1)
    place = {"rank": rank, "world_size": size, "local_rank": rank, "local_world_size": size}
    init_process_group(
        RankEnv(**place, init_method=init_method, launcher="local"), "gloo", timedelta(minutes=1)
    )
    axis = ParallelGroups.create(ParallelConfig(sp_size=size)).sp
    mailbox = open_mailbox(axis, functools.partial(gather_objects, axis=axis), 60, size)
    wires = {"gloo": Wire(axis, Ledger()), "mail": Wire(axis, Ledger(), mailbox)}
    times: dict[str, list[float]] = {name: [] for name in wires}
    for _ in range(ROUNDS):
        for name, wire in wires.items():
            times[name].append(_gather_time(wire, size))
    if rank == 0:
        gloo, mail = (1e6 * statistics.median(times[name]) for name in ("gloo", "mail"))
        print(f"| {size} | {gloo:.0f} | {mail:.0f} | {gloo / mail:.1f}x |", flush=True)


def _gather_time(wire: Wire, size: int) -> float:
    """Seconds a gather."""
    queries = torch.ones(1, 9, 64)
    start = time.perf_counter()
    for _ in range(GATHERS):
        gather_tokens(queries, wire, [1] * size, "gather_queries").wait()
    return (time.perf_counter() - start) / GATHERS


if __name__ == "__main__":
    main()
