"""`--sp auto` and `--tp auto`: numbers in their place, from the devices of this host or of a world.

Finds devices and memory; engine/auto_layout.py chooses.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from megatron_sps2.cli.arguments import AUTO
from megatron_sps2.cli.device import device_kind, ranks_per_device
from megatron_sps2.config import ModelConfig
from megatron_sps2.engine.auto_layout import Choice, Devices, Wish, choose_layout
from megatron_sps2.model.manifest import load_model_config
from megatron_sps2.parallel.host import host_memory, num_cores, num_numa_nodes
from megatron_sps2.parallel.rank_env import RankEnv

STDIN = "-"
# A text has fewer tokens than bytes: by three or four in English, by one or two in code and other scripts.
BYTES_PER_TOKEN = 2


def settle_layout(args: argparse.Namespace, env: RankEnv | None = None) -> None:
    """Makes args.sp and args.tp numbers; rank 0 says on stderr which, and why.

    With `env`, of a launcher: collective where the world is up, and then the same on every rank; args.device
    must be this rank's. Raises ValueError, on all ranks alike, where nothing fits.
    """
    if AUTO not in (args.sp, args.tp):
        return
    if args.checkpoint is None:
        raise ValueError("--sp auto and --tp auto depend on the model; give --checkpoint, or numbers")
    choice = _choose_here(args) if env is None else _choose_launched(args, env)
    args.sp, args.tp = choice.parallel.sp_size, choice.parallel.tp_size
    if env is None or env.rank == 0:
        print(f"sps2: {choice.why}", file=sys.stderr, flush=True)


def _choose_here(args: argparse.Namespace) -> Choice:
    kind = device_kind(args.device)
    wish = _wish(args, kind)
    return choose_layout(wish, _cuda_devices() if kind == "cuda" else _cpu_ranks(wish))


def _choose_launched(args: argparse.Namespace, env: RankEnv) -> Choice:
    import torch.distributed as dist

    from megatron_sps2.parallel.collectives import from_first_rank, gather_objects
    from megatron_sps2.parallel.groups import world_axis

    mine = (_free_bytes(args.device, env), env.local_world_size)
    if not dist.is_initialized():  # doctor without --world: this rank speaks of itself alone
        return _choose_of(args, env, [mine])
    ranks = gather_objects(mine, world_axis())
    # Rank 0's alone: the prompt's file need not be on the other hosts.
    return from_first_rank(lambda: _choose_of(args, env, ranks))


def _choose_of(args: argparse.Namespace, env: RankEnv, ranks: Sequence[tuple[int, int]]) -> Choice:
    """From each rank's (free bytes, ranks on its host)."""
    kind = device_kind(args.device)
    devices = Devices(
        count=env.world_size,
        per_node=math.gcd(*(local for _, local in ranks)),
        free_bytes=min(free for free, _ in ranks),
        kind="CUDA device" if kind == "cuda" else "CPU rank",
        launched=True,
    )
    return choose_layout(_wish(args, kind), devices)


def _free_bytes(device: str, env: RankEnv) -> int:
    """For one rank; those of a CPU share their host's, and over gloo ranks may share a device."""
    if device_kind(device) == "cpu":
        return host_memory()[0] // env.local_world_size
    import torch

    free = int(torch.cuda.mem_get_info(device if ":" in device else env.local_rank)[0])
    return free // ranks_per_device(env, torch.cuda.device_count())


def _cpu_ranks(wish: Wish) -> Devices:
    """A rank for each memory bus, two where there is one: more would wait for it. Given sizes stay."""
    given = wish.dp_size * (wish.sp_size or 1) * (wish.tp_size or 1)
    count = max(num_numa_nodes(), min(2, num_cores()), given)
    return Devices(count=count, per_node=count, free_bytes=host_memory()[0] // count, kind="CPU rank")


def _cuda_devices() -> Devices:
    """Asked in a process of its own: looking at a device's memory takes some of it until the process ends."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        free = pool.submit(_free_of_each).result()
    return Devices(count=len(free), per_node=len(free), free_bytes=min(free), kind="CUDA device")


def _free_of_each() -> list[int]:
    import torch

    return [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]


def _wish(args: argparse.Namespace, kind: str) -> Wish:
    model = load_model_config(args.checkpoint)
    return Wish(
        model=model,
        longest=longest_wanted(args, model),
        dtype=args.dtype,
        kv_cache_dtype=args.kv_cache_dtype,
        block_size=args.block_size,
        # On a CPU a tied matrix is kept a second time, in a layout that makes logits fast.
        output_copy=kind == "cpu" or not model.tie_embeddings,
        dp_size=getattr(args, "dp", 1),
        sp_size=None if args.sp == AUTO else args.sp,
        tp_size=None if args.tp == AUTO else args.tp,
    )


def longest_wanted(args: argparse.Namespace, model: ModelConfig) -> int:
    """Tokens of prompt and answer to make room for; a prompt that is at hand is measured by its bytes."""
    if args.max_model_len:
        return int(args.max_model_len)
    num_bytes = _prompt_bytes(args)
    if num_bytes is None:
        return model.max_seq_len
    return min(model.max_seq_len, -(-num_bytes // BYTES_PER_TOKEN) + int(args.max_tokens))


def _prompt_bytes(args: argparse.Namespace) -> int | None:
    """None for stdin, which can be read but once, and for commands that have no prompt yet."""
    if getattr(args, "prompt", None) not in (None, STDIN):
        return len(args.prompt.encode())
    path = getattr(args, "prompt_file", None) or getattr(args, "prompt_ids", None)
    return None if path in (None, STDIN) else Path(path).stat().st_size
