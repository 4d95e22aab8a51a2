"""Starts the world a command runs in: the launcher's, or ranks of our own on this host.

Knows environments and processes; what the ranks do is the command's.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from datetime import timedelta

from megatron_sps2.cli.arguments import parallel_config
from megatron_sps2.parallel.rank_env import RankEnv, init_process_group, threads_per_rank

PRELOAD = ("torch.distributed", "megatron_sps2.engine.build")


def in_world(args: argparse.Namespace, body: Callable[[argparse.Namespace], int]) -> int:
    """Runs `body(args)` on every rank of an initialised torch.distributed world -> exit code.

    Under a launcher this process is one of the ranks; without one, sp x tp local ranks are started.
    """
    from megatron_sps2.parallel.local_world import run_local_world

    parallel = parallel_config(args)
    env = RankEnv.detect()
    if env is None and parallel.world_size > 1:
        return run_local_world(parallel.world_size, _rank_main, (args, body), preload=PRELOAD)
    env = env or RankEnv.alone()
    env.check_world(parallel)
    return _run_rank(args, body, env)


def _rank_main(args: argparse.Namespace, body: Callable[[argparse.Namespace], int]) -> int:
    """A local rank, in a process of its own."""
    from megatron_sps2.cli.main import report

    try:
        env = RankEnv.detect()
        assert env is not None, "a local rank was started without its environment"
        return _run_rank(args, body, env)
    except Exception as error:  # The outermost loop of this process.
        return report(error)


def _run_rank(args: argparse.Namespace, body: Callable[[argparse.Namespace], int], env: RankEnv) -> int:
    import torch
    import torch.distributed as dist

    args.device = pick_device(args.device, env.local_rank)
    if args.device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads_per_rank(env.local_world_size))
    backend = "nccl" if args.device.startswith("cuda") else "gloo"
    init_process_group(env, backend, timedelta(seconds=args.timeout_s))
    code = body(args)
    dist.destroy_process_group()
    return code


def pick_device(wanted: str, local_rank: int) -> str:
    """'cpu' or 'cuda:N'. Raises ValueError when cuda is asked for and there is none for this rank."""
    import torch

    count = torch.cuda.device_count() if wanted != "cpu" else 0
    if wanted == "cpu" or (wanted == "auto" and count == 0):
        return "cpu"
    if local_rank >= count:
        raise ValueError(
            f"--device {wanted}: this host has {count} CUDA devices and local rank {local_rank} needs its own; "
            "start fewer ranks here or use --device cpu"
        )
    torch.cuda.set_device(local_rank)
    return f"cuda:{local_rank}"


def is_first_rank() -> bool:
    env = _env()
    return env is None or env.rank == 0


def rank_label() -> str:
    """'[rank 1 on host] ' under a launcher, '' for a process alone."""
    env = _env()
    return f"[rank {env.rank} of {env.world_size}] " if env and env.world_size > 1 else ""


def _env() -> RankEnv | None:
    try:
        return RankEnv.detect()
    except RuntimeError:
        return None
