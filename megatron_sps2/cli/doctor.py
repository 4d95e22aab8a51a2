"""`sps2 doctor`: what is installed, which ranks this is, what a checkpoint needs in memory per rank."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_sps2.cli.arguments import check_size_flags, parallel_config
from megatron_sps2.cli.device import device_kind, pick_backend
from megatron_sps2.cli.installed import PACKAGES, installed
from megatron_sps2.cli.layout import settle_layout
from megatron_sps2.config import DType, ModelConfig, ParallelConfig
from megatron_sps2.engine.rank_memory import rank_memory
from megatron_sps2.model.manifest import load_model_config
from megatron_sps2.parallel.host import num_cores
from megatron_sps2.parallel.rank_env import RankEnv, threads_per_rank


def run(args: argparse.Namespace) -> int:
    if args.world:
        from megatron_sps2.cli.doctor_world import run_world

        return run_world(args)
    settle_layout(args, RankEnv.detect())
    parallel = parallel_config(args)
    found = {"installed": installed(), "machine": _machine(args), "ranks": _ranks(parallel)}
    if args.checkpoint:
        found["memory per rank"] = memory_per_rank(args, load_model_config(args.checkpoint))
    if args.json:
        print(json.dumps(found))
    else:
        for title, section in found.items():
            _print_section(title, section)
    return 0


def memory_per_rank(args: argparse.Namespace, model: ModelConfig) -> dict[str, Any]:
    """Bytes one rank keeps: its weights, and the KV cache of a request of max_model_len tokens.

    Computing needs some more, for a while: about activation_bytes for the rank's part of the prompt.
    """
    check_size_flags(args, model)
    longest = args.max_model_len or model.max_seq_len
    memory = rank_memory(
        model,
        parallel_config(args),
        dtype=args.dtype,
        kv_cache_dtype=args.kv_cache_dtype,
        max_model_len=longest,
        block_size=args.block_size,
        output_copy=has_output_copy(model, args.dtype, device_kind(args.device)),
    )
    return {
        "weights_bytes": memory.weights,
        "kv_bytes": memory.kv,
        "total_bytes": memory.kept,
        "activation_bytes": memory.activations,
        "kv_bytes_per_token": memory.kv_per_token,
        "kv_tokens": memory.kv_tokens,
        "max_model_len": longest,
    }


def has_output_copy(model: ModelConfig, dtype: DType, device: str) -> bool:
    """Untied, or tied and kept a second time in the layout that makes logits fast."""
    import torch

    from megatron_sps2.model.linear import can_pack

    return not model.tie_embeddings or can_pack(torch.empty(1, 1, dtype=getattr(torch, dtype), device=device))


def _machine(args: argparse.Namespace) -> dict[str, Any]:
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu_cores": num_cores(),
        "cuda_devices": devices,
        "backend": pick_backend(args.backend, device_kind(args.device)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
    }


def _ranks(parallel: ParallelConfig) -> dict[str, Any]:
    env = RankEnv.detect()
    if env is None:
        return {
            "launcher": "none: local ranks are started",
            "world_size": parallel.world_size,
            "threads_per_rank": threads_per_rank(parallel.world_size),
        }
    env.check_world(parallel)
    return {
        "launcher": env.launcher,
        "rank": env.rank,
        "world_size": env.world_size,
        "local_rank": env.local_rank,
        "threads_per_rank": threads_per_rank(env.local_world_size),
    }


def _print_section(title: str, section: dict[str, Any]) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in section.items():
        shown = f"{value / 2**20:,.1f} MiB" if name.endswith("_bytes") else _spell(value)
        table.add_row(_label(name), shown)
    Console().print(table)


def _label(name: str) -> str:
    return name if name in PACKAGES else name.removesuffix("_bytes").replace("_", " ")


def _spell(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return f"{value:,}" if isinstance(value, int) else str(value)
