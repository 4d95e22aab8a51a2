"""The device that --device means for this rank, and its kind on this host."""

from __future__ import annotations

import os

from megatron_sps2.parallel.rank_env import RankEnv


def device_kind(wanted: str) -> str:
    """'cpu' or 'cuda', for the flag or the device picked by it. Raises ValueError for a missing device."""
    import torch

    count = torch.cuda.device_count() if wanted != "cpu" else 0
    if wanted.startswith("cuda") and count == 0:
        raise ValueError(f"--device {wanted}: this host has 0 CUDA devices; use --device cpu")
    return "cuda" if count else "cpu"


def pick_device(wanted: str, env: RankEnv) -> str:
    """'cpu' or 'cuda:N'. Raises ValueError when cuda is asked for and there is none for this rank."""
    import torch

    count = torch.cuda.device_count() if wanted != "cpu" else 0
    if wanted == "cpu" or (wanted == "auto" and count == 0):
        return "cpu"
    index = device_index(env, count)
    if index >= count:
        raise ValueError(
            f"--device {wanted}: this host has {count} CUDA devices and local rank {index} needs its "
            "own; start fewer ranks here or use --device cpu"
        )
    torch.cuda.set_device(index)
    return f"cuda:{index}"


def device_index(env: RankEnv, count: int) -> int:
    """Of this rank's device among the `count` that it sees; SLURM may show each task its own alone."""
    shows_own = any(name in os.environ for name in ("SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND"))
    return 0 if env.launcher == "slurm" and shows_own and count == 1 else env.local_rank
