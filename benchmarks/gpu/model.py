"""A model of random weights on the device, through the project's own modules, on one rank."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.case import Bench
from megatron_sps2.config import ModelConfig

LLAMA_8B = ModelConfig(
    num_layers=32,
    hidden_size=4096,
    ffn_hidden_size=14336,
    num_attention_heads=32,
    num_query_groups=8,
    head_dim=128,
    vocab_size=128256,
    max_seq_len=262144,
    rotary_base=500000.0,
)
TINY = replace(
    LLAMA_8B,
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=16,
    vocab_size=97,
)


def shape(bench: Bench) -> ModelConfig:
    return bench.pick(full=LLAMA_8B, quick=replace(LLAMA_8B, num_layers=4), tiny=TINY)


@contextmanager
def world_of_one() -> Iterator[Any]:
    """ParallelGroups of a world with this process alone."""
    from megatron_sps2.config import ParallelConfig
    from megatron_sps2.parallel.groups import ParallelGroups

    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield ParallelGroups.create(ParallelConfig())
        finally:
            dist.destroy_process_group()


def random_forward(bench: Bench, groups: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """-> GptForward, and the StepContext that its layers are bound to."""
    import megatron_sps2.model.eager  # noqa: F401  # before all that imports Megatron
    from megatron_sps2.attention.core import SequenceParallelAttention, StepContext
    from megatron_sps2.model.gpt import GptForward
    from megatron_sps2.model.spec import build_gpt

    model, context = shape(bench), StepContext()
    core = functools.partial(SequenceParallelAttention, context=context)
    gpt = build_gpt(model, groups.to_megatron(), core, dtype, bench.device)
    with torch.no_grad():
        for name, weight in gpt.named_parameters():
            weight.fill_(1.0) if "norm" in name else weight.normal_(std=0.02)
    return GptForward(gpt, model), context
