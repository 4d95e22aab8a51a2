"""`sps2 doctor`: what is installed, which ranks this is, what a checkpoint needs in memory per rank."""

from __future__ import annotations

import argparse
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_sps2.cli.arguments import parallel_config
from megatron_sps2.cli.report import ELEMENT_SIZE
from megatron_sps2.config import ModelConfig, ParallelConfig
from megatron_sps2.model.manifest import load_model_config
from megatron_sps2.parallel.rank_env import RankEnv, threads_per_rank

PACKAGES = ("megatron_sps2", "torch", "megatron-core", "deepspeed", "mpi4py", "transformers", "sentencepiece")


def run(args: argparse.Namespace) -> int:
    parallel = parallel_config(args)
    found = {"installed": _installed(), "machine": _machine(), "ranks": _ranks(parallel)}
    if args.checkpoint:
        model = load_model_config(args.checkpoint)
        parallel.check_model(model)
        length = args.max_model_len or model.max_seq_len
        found["memory"] = memory_per_rank(model, parallel, ELEMENT_SIZE[args.dtype], length)
    if args.json:
        print(json.dumps(found))
    else:
        for title, section in found.items():
            _print_section(title, section)
    return 0


def memory_per_rank(
    model: ModelConfig, parallel: ParallelConfig, element_size: int, max_model_len: int
) -> dict[str, Any]:
    """Bytes one rank needs for its weights and for the KV of one request of max_model_len tokens."""
    heads = model.num_attention_heads + model.num_query_groups
    per_layer = 2 * heads * model.head_dim * model.hidden_size + 3 * model.hidden_size * model.ffn_hidden_size
    embedding = model.vocab_size * model.hidden_size
    # A tied matrix is kept a second time, in the layout that makes logits fast.
    sharded = model.num_layers * per_layer + 2 * embedding
    norms = (2 * model.num_layers + 1) * model.hidden_size
    tokens = -(-max_model_len // parallel.sp_size)
    kv_per_token = 2 * model.num_layers * model.num_query_groups // parallel.tp_size * model.head_dim
    return {
        "weights_bytes": round((sharded / parallel.tp_size + norms) * element_size),
        "kv_bytes": tokens * kv_per_token * element_size,
        "kv_bytes_per_token": kv_per_token * element_size,
        "max_model_len": max_model_len,
        "kv_tokens": tokens,
    }


def _installed() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["NVIDIA apex"] = "fused norm found" if _has_fused_norm() else "not found (optional)"
    return found


def _has_fused_norm() -> bool:
    try:
        from apex.normalization import FusedRMSNorm  # noqa: F401
    except ImportError:
        return False
    return True


def _machine() -> dict[str, Any]:
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cuda_devices": devices,
        "backend": "nccl" if devices else "gloo",
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
        shown = f"{value / 2**20:,.1f} MiB" if name in ("weights_bytes", "kv_bytes") else value
        table.add_row(name.replace("_", " ").removesuffix(" bytes"), str(shown))
    Console().print(table)
