"""A decode step through all layers as the engine runs it: launched anew, and replayed as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.case import Absent, Bench, Case, Row
from benchmarks.gpu.checks import LIMITS, compare
from benchmarks.gpu.model import random_forward, shape, world_of_one
from benchmarks.gpu.timing import milliseconds, on_every_turn

K = 1024
BLOCK_SIZE = 64
Step = Callable[[], Tensor]


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
        cache = _cache(bench, forward, batch, num_tokens)
        make = partial(_step, forward, context, cache, groups, batch, num_tokens)
        launched = make(_Launched())
        wanted = launched()
        step, pairs = launched, []
        if graph:
            from megatron_sps2.engine.decode_graph import CudaRecorder

            step = make(CudaRecorder())
            pairs = [(step(), wanted)]
        check = compare((step(),), pairs, LIMITS[torch.bfloat16])
        taken = milliseconds(on_every_turn(step), bench.device)
    moved = _read_bytes(forward) + batch * num_tokens * cache.bytes_per_token
    return Row(
        shape=f"{model.num_layers} layers of hidden {model.hidden_size}, {batch} rows of {num_tokens}, bf16",
        milliseconds=taken,
        rate=moved / taken / 1e9,
        unit="TB/s",
        check=check,
    )


def _read_bytes(forward: Any) -> int:
    """Of weights: of an embedding that makes no logits a step reads a row for each token."""
    embedding = 0 if forward.model.tie_embeddings else forward.gpt.embedding.word_embeddings.weight.nbytes
    return int(forward.weight_bytes - embedding)


class _Launched:
    """In place of a recorder: replaying is running anew."""

    def warm_up(self, body: Step) -> None:
        body()

    def record(self, body: Step) -> Step:
        return body


def _cache(bench: Bench, forward: Any, batch: int, num_tokens: int) -> Any:
    """A KVCache where each request has room for `num_tokens` tokens; all slots hold random numbers."""
    from megatron_sps2.attention.kv_cache import KVCache
    from megatron_sps2.config import CacheConfig

    model, blocks = forward.model, -(-num_tokens // BLOCK_SIZE)
    numbers = 2 * model.num_layers * model.num_query_groups * model.head_dim
    bench.needs(2 * numbers * batch * blocks * BLOCK_SIZE, "the cache")
    cache = KVCache(
        CacheConfig(num_blocks=batch * blocks, block_size=BLOCK_SIZE),
        num_layers=model.num_layers,
        num_kv_heads=model.num_query_groups,
        head_dim=model.head_dim,
        dtype=torch.bfloat16,
        device=bench.device,
    )
    for layer in range(model.num_layers):
        for held in (cache.layer(layer).keys, cache.layer(layer).values):
            held.normal_()
    return cache


def _step(
    forward: Any, context: Any, cache: Any, groups: Any, batch: int, num_tokens: int, recorder: Any
) -> Step:
    """-> a function that gives logits of the last of `num_tokens` tokens of `batch` requests."""
    from megatron_sps2.attention.decode import DecodeRow, DecodeStep
    from megatron_sps2.attention.window import NO_WINDOWS
    from megatron_sps2.engine.decode_graph import DecodeGraphs
    from megatron_sps2.ops.append import append_roped
    from megatron_sps2.ops.kernel_set import choose_kernels
    from megatron_sps2.parallel.collectives import Wire
    from megatron_sps2.parallel.ledger import Ledger

    kernels = choose_kernels("auto", cache.device)
    if kernels.append_roped is None:  # torch's set leaves turning to Megatron, which cannot be recorded
        kernels = replace(kernels, append_roped=append_roped)
    blocks = cache.config.num_blocks // batch
    for request in range(batch):
        cache.free(request)
        cache.grant(request, list(range(request * blocks, (request + 1) * blocks)))
        cache.extend(request, num_tokens - 1)
    scale = forward.model.softmax_scale
    rows = [DecodeRow(request, home=0, kv_rank=0, spread=False) for request in range(batch)]
    wire = Wire(groups.sp, Ledger())
    step = DecodeStep(cache=cache, wire=wire, rows=rows, scale=scale, kernels=kernels)
    fixed = {"scale": scale, "windows": NO_WINDOWS, "max_rows": batch, "max_tokens": num_tokens}
    graphs = DecodeGraphs(forward, cache, context, kernels, wire, recorder=recorder, **fixed)
    graphs.record()
    ids, positions = [5] * batch, [num_tokens - 1] * batch

    def run() -> Tensor:
        logits: Tensor = forward.logits(graphs.run(ids, positions, step))
        if logits.is_cuda:
            torch.cuda.synchronize()  # the engine waits, too: it samples before the next step
        return logits

    return run
