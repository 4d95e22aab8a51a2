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

from megatron_sps2.cli.arguments import check_size_flags, parallel_config
from megatron_sps2.cli.report import ELEMENT_SIZE
from megatron_sps2.config import DType, ModelConfig, ParallelConfig
from megatron_sps2.model.manifest import load_model_config
from megatron_sps2.parallel.rank_env import RankEnv, threads_per_rank

PACKAGES = ("megatron_sps2", "torch", "megatron-core", "deepspeed", "mpi4py", "transformers", "sentencepiece")


def run(args: argparse.Namespace) -> int:
    parallel = parallel_config(args)
    found = {"installed": _installed(), "machine": _machine(args.device), "ranks": _ranks(parallel)}
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

    Computing needs some more, for a while: activations of the rank's part of the prompt.
    """
    from megatron_sps2.cli.world import pick_device
    from megatron_sps2.engine.build import EngineConfig

    check_size_flags(args, model)
    config = EngineConfig(
        checkpoint=args.checkpoint,
        parallel=parallel_config(args),
        max_model_len=args.max_model_len or model.max_seq_len,
        block_size=args.block_size,
    )
    cache, tp_size, size = config.sized_cache(), config.parallel.tp_size, ELEMENT_SIZE[args.dtype]
    output_copy = has_output_copy(model, args.dtype, pick_device(args.device, 0))
    weights = num_weights(model, tp_size, output_copy) * size
    kv_per_token = 2 * model.num_layers * (model.num_query_groups // tp_size) * model.head_dim * size
    return {
        "weights_bytes": weights,
        "kv_bytes": cache.tokens_per_rank * kv_per_token,
        "total_bytes": weights + cache.tokens_per_rank * kv_per_token,
        "kv_bytes_per_token": kv_per_token,
        "kv_tokens": cache.tokens_per_rank,
        "max_model_len": config.max_model_len,
    }


def num_weights(model: ModelConfig, tp_size: int, output_copy: bool) -> int:
    """Elements that one tp rank keeps; `output_copy`: the output layer has a matrix of its own."""
    hidden, ffn = model.hidden_size, (1 + model.gated) * model.ffn_hidden_size
    q_size, kv_size = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
    mlp = (ffn + model.ffn_hidden_size) * hidden * (model.num_experts or 1)
    shared = (2 * q_size + 2 * kv_size) * hidden + mlp
    shared += (q_size + 2 * kv_size) * (model.qkv_bias or model.linear_bias) + ffn * model.linear_bias
    whole = hidden * (2 * model.linear_bias + model.num_experts) + 2 * model.head_dim * model.qk_norm
    norm = hidden * (1 + (model.norm == "layer"))
    rows = -(-model.vocab_size // tp_size)  # the vocabulary is padded to a multiple of tp_size
    embeddings = (1 + output_copy) * rows * hidden + model.max_seq_len * hidden * model.learned_positions
    norms = (4 if model.is_gemma else 2) * norm
    return model.num_layers * (shared // tp_size + whole + norms) + embeddings + norm


def has_output_copy(model: ModelConfig, dtype: DType, device: str) -> bool:
    """Untied, or tied and kept a second time in the layout that makes logits fast."""
    import torch

    from megatron_sps2.model.linear import can_pack

    return not model.tie_embeddings or can_pack(torch.empty(1, 1, dtype=getattr(torch, dtype), device=device))


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


def _machine(device: str) -> dict[str, Any]:
    import torch

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "cuda_devices": devices,
        "backend": "nccl" if devices and device != "cpu" else "gloo",
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
