"""A decode step through all layers of the model, launched one by one and replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.case import Absent, Bench, Case, Row
from benchmarks.gpu.checks import LIMITS, compare
from benchmarks.gpu.model import random_forward, shape, world_of_one
from benchmarks.gpu.timing import milliseconds

K = 1024
BLOCK_SIZE = 64


def cases(bench: Bench) -> Iterator[Case]:
    context = bench.pick(full=128 * K, quick=32 * K, tiny=100)
    for batch in bench.pick(full=(1, 4), quick=(1,), tiny=(2,)):
        for graph in (False, True):
            yield Case(
                name="decode step" + (", CUDA graph" if graph else ""),
                measure=partial(_measure, bench, batch, context, graph),
            )


def _measure(bench: Bench, batch: int, num_tokens: int, graph: bool) -> Row:
    if graph and bench.device.type != "cuda":
        raise Absent("CUDA graphs need a CUDA device")
    model = shape(bench)
    with world_of_one() as groups:
        forward, context = random_forward(bench, groups, torch.bfloat16)
        step, cache = _step(bench, forward, context, groups, batch, num_tokens)
        launched, call = step(), lambda _: step()
        check = compare((launched,), (), 0.0)
        if graph:
            call, replayed = _captured(step)
            call(0)
            check = compare((replayed,), ((replayed, launched),), LIMITS[torch.bfloat16])
        taken = milliseconds(call, bench.device)
    moved = forward.weight_bytes + batch * num_tokens * cache.bytes_per_token
    return Row(
        shape=f"{model.num_layers} layers of hidden {model.hidden_size}, {batch} rows of {num_tokens}, bf16",
        milliseconds=taken,
        rate=moved / taken / 1e9,
        unit="TB/s",
        check=check,
    )


def _step(
    bench: Bench, forward: Any, context: Any, groups: Any, batch: int, num_tokens: int
) -> tuple[Any, Any]:
    """-> a function that gives logits of one more token for `batch` requests, and their cache."""
    from megatron_sps2.attention.decode import DecodeRow, DecodeStep
    from megatron_sps2.attention.kv_cache import KVCache
    from megatron_sps2.config import CacheConfig
    from megatron_sps2.ops.kernel_set import choose_kernels
    from megatron_sps2.parallel.collectives import Wire
    from megatron_sps2.parallel.ledger import Ledger

    model, device = forward.model, bench.device
    blocks = num_tokens // BLOCK_SIZE + 1
    bench.needs(
        4 * model.num_layers * model.num_query_groups * model.head_dim * batch * blocks * BLOCK_SIZE,
        "the cache",
    )
    cache = KVCache(
        CacheConfig(num_blocks=batch * blocks, block_size=BLOCK_SIZE),
        num_layers=model.num_layers,
        num_kv_heads=model.num_query_groups,
        head_dim=model.head_dim,
        dtype=torch.bfloat16,
        device=device,
    )
    for request in range(batch):
        cache.grant(request, list(range(request * blocks, (request + 1) * blocks)))
        runs = cache.extend(request, num_tokens - 1)
        new = torch.randn(2, num_tokens - 1, model.num_query_groups, model.head_dim, device=device)
        for layer in range(model.num_layers):
            cache.write(layer, runs, *new.bfloat16())
    rows = [DecodeRow(request, home=0, kv_rank=0, spread=False) for request in range(batch)]
    context.step = DecodeStep(
        cache=cache,
        wire=Wire(groups.sp, Ledger()),
        rows=rows,
        scale=model.softmax_scale,
        # Megatron's layers turn queries and keys: nothing then depends on what the engine keeps of a step.
        kernels=replace(choose_kernels("auto", device), append_roped=None),
    )
    ids = torch.full((batch, 1), 5, device=device)
    positions = torch.full((batch,), num_tokens - 1, device=device)
    angles = forward.angles(positions)

    def step() -> Tensor:
        hidden = forward.embed(ids, positions)
        for layer in range(forward.num_layers):
            hidden = forward.layer(layer, hidden, angles)
        return forward.logits(hidden)

    return step, cache


def _captured(step: Any) -> tuple[Any, Tensor]:
    """-> a function that replays the step, and the logits that it fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()
    return (lambda _: graph.replay()), logits
