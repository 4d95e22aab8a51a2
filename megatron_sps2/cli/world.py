"""Starts the world a command runs in: the launcher's, or ranks of our own on this host.

Knows environments and processes; what the ranks do is the command's.
"""

from __future__ import annotations

import argparse
import functools
import os
from collections.abc import Callable
from datetime import timedelta

from megatron_sps2.cli.arguments import parallel_config
from megatron_sps2.cli.layout import settle_layout
from megatron_sps2.cli.process import USER_ERROR, report, set_logging
from megatron_sps2.parallel.local_world import Companion, run_local_world
from megatron_sps2.parallel.rank_env import (
    RankEnv,
    init_process_group,
    limit_shape_caches,
    threads_per_rank,
)

PRELOAD = ("torch.distributed", "megatron_sps2.engine.build")
Body = Callable[[argparse.Namespace], int]
Check = Callable[[argparse.Namespace], None]


def in_world(args: argparse.Namespace, body: Body, check: Check, explained: int = USER_ERROR) -> int:
    """Runs `body(args)` on every rank of an initialised torch.distributed world -> exit code.

    Under a launcher this process is one of the ranks; without one, sp x tp local ranks are started.
    `check(args)` raises for what is wrong before a rank has to work; it fails on all ranks or on none.
    `explained` is the exit code of a local rank that needs no line to say so.
    """
    env = RankEnv.detect()
    if env is not None:
        return _run_rank(args, body, env, check)
    settle_layout(args)
    check(args)
    if parallel_config(args).world_size == 1:
        return _run_rank(args, body, RankEnv.alone())
    return in_local_world(args, body, explained=explained)


def in_local_world(
    args: argparse.Namespace, body: Body, companion: Companion | None = None, explained: int = USER_ERROR
) -> int:
    """Starts dp x sp x tp ranks on this host, and a process beside them -> exit code."""
    world_size = parallel_config(args).world_size
    return run_local_world(
        world_size,
        _rank_main,
        (args, body),
        preload=PRELOAD,
        explained=explained,
        companion=companion,
    )


def _rank_main(args: argparse.Namespace, body: Body) -> int:
    """A local rank, in a process of its own."""
    set_logging(args.log_level)
    try:
        env = RankEnv.detect()
        assert env is not None, "a local rank was started without its environment"
        return _run_rank(args, body, env)
    except Exception as error:  # The outermost loop of this process.
        return report(error)


def _run_rank(args: argparse.Namespace, body: Body, env: RankEnv, check: Check | None = None) -> int:
    limit_shape_caches(os.environ)
    import torch
    import torch.distributed as dist

    from megatron_sps2.parallel.collectives import agree

    args.device = pick_device(args.device, env.local_rank)
    if args.device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads_per_rank(env.local_world_size))
    backend = "nccl" if args.device.startswith("cuda") else "gloo"
    init_process_group(env, backend, timedelta(seconds=args.timeout_s))
    settle_layout(args, env)
    if check:
        agree(functools.partial(_check, args, env, check))
    code = body(args)
    dist.destroy_process_group()
    return code


def _check(args: argparse.Namespace, env: RankEnv, check: Check) -> None:
    env.check_world(parallel_config(args))
    check(args)


def pick_device(wanted: str, local_rank: int) -> str:
    """'cpu' or 'cuda:N'. Raises ValueError when cuda is asked for and there is none for this rank."""
    import torch

    count = torch.cuda.device_count() if wanted != "cpu" else 0
    if wanted == "cpu" or (wanted == "auto" and count == 0):
        return "cpu"
    if local_rank >= count:
        raise ValueError(
            f"--device {wanted}: this host has {count} CUDA devices and local rank {local_rank} needs its "
            "own; start fewer ranks here or use --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return f"cuda:{local_rank}"
