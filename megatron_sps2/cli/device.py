"""The device and the backend that --device and --backend mean for this rank, and their kind on this host."""

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


def pick_backend(wanted: str, device: str) -> str:
    """'nccl' or 'gloo', for --backend on a device. Raises ValueError for NCCL without a CUDA device."""
    on_cuda = device.startswith("cuda")
    if wanted == "nccl" and not on_cuda:
        raise ValueError(
            f"--backend nccl sends between CUDA devices and ranks here use {device}; use --backend gloo"
        )
    return wanted if wanted != "auto" else "nccl" if on_cuda else "gloo"


def pick_device(wanted: str, env: RankEnv, backend: str = "auto") -> str:
    """'cpu' or 'cuda:N'; over gloo several ranks may share a device.

    Raises ValueError when cuda is asked for and there is none, or with NCCL none for this rank alone.
    """
    import torch

    if device_kind(wanted) == "cpu":
        return "cpu"
    count = torch.cuda.device_count()
    index = device_index(env, count)
    if index >= count and pick_backend(backend, "cuda") == "nccl":
        raise ValueError(
            f"--device {wanted}: this host has {count} CUDA devices, and NCCL wants one for local rank "
            f"{index} alone; start fewer ranks here, use --device cpu, or try things out on shared devices "
            "with --backend gloo"
        )
    torch.cuda.set_device(index % count)
    return f"cuda:{index % count}"


def device_index(env: RankEnv, count: int) -> int:
    """Of this rank's device among the `count` that it sees; SLURM may show each task its own alone."""
    return 0 if _sees_own_alone(env, count) else env.local_rank


def ranks_per_device(env: RankEnv, count: int) -> int:
    """How many ranks of this host share the fullest of the `count` devices that this one sees."""
    return 1 if _sees_own_alone(env, count) else -(-env.local_world_size // count)


def _sees_own_alone(env: RankEnv, count: int) -> bool:
    shows_own = any(name in os.environ for name in ("SLURM_GPUS_PER_TASK", "SLURM_GPU_BIND"))
    return env.launcher == "slurm" and shows_own and count == 1
