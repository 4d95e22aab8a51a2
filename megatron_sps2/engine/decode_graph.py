"""Decode steps that are recorded once for each size of batch and replayed: no launch is paid for by the host.

For a world of one rank. Knows the model and the cache, no requests.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from megatron_sps2.attention.core import StepContext
from megatron_sps2.attention.decode import DecodeStep
from megatron_sps2.attention.kv_cache import KVCache
from megatron_sps2.attention.static_decode import StaticBatch, StaticDecodeStep
from megatron_sps2.attention.window import Windows
from megatron_sps2.model.gpt import GptForward
from megatron_sps2.ops.kernel_set import Kernels

# Runs what it is given and gives a function that does so again, into the same tensor.
Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


def bucket_sizes(max_rows: int) -> list[int]:
    """Batch sizes that are recorded: 1, 2, 4, then every eighth; others run in the next larger one."""
    sizes = [size for size in (1, 2, 4, *range(8, max_rows, 8)) if size < max_rows]
    return [*sizes, max_rows]


class CudaRecorder:
    """Records CUDA graphs that share their memory: one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # one for all: libraries keep a workspace for each

    def __call__(self, body: Callable[[], Tensor]) -> Callable[[], Tensor]:
        # Once before: kernels are compiled and libraries make their workspaces.
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            body()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            out = body()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


class DecodeGraphs:
    """All recorded sizes, over one set of tensors."""

    def __init__(
        self,
        forward: GptForward,
        cache: KVCache,
        context: StepContext,
        kernels: Kernels,
        *,
        max_rows: int,
        max_tokens: int,
        scale: float,
        windows: Windows,
        record: Record,
    ) -> None:
        self._forward, self._cache, self._context = forward, cache, context
        self._kernels, self._scale, self._windows = kernels, scale, windows
        block_size = cache.config.block_size
        self._batch = StaticBatch(max_rows, -(-max_tokens // block_size) + 1, block_size, cache.device)
        self._sizes = bucket_sizes(max_rows)
        # The largest first, so that the others find its memory.
        self._replays = {size: record(partial(self._body, size)) for size in reversed(self._sizes)}

    def run(self, token_ids: list[int], positions: list[int], step: DecodeStep) -> Tensor:
        """A batch whose room `step` has made -> hidden [b, 1, h] after the last layer, for now."""
        self._batch.fill(token_ids, positions, step)
        size = self._sizes[bisect_left(self._sizes, len(token_ids))]
        return self._replays[size]()[: len(token_ids)]

    @torch.inference_mode()
    def _body(self, size: int) -> Tensor:
        ids, places = self._batch.inputs(size)
        slots, shards, near = self._batch.rows(size)
        hidden, angles = self._forward.embed(ids, places), self._forward.angles(places)
        self._context.step = StaticDecodeStep(
            cache=self._cache,
            kernels=self._kernels,
            scale=self._scale,
            rotation_of=self._forward.rotations(angles, hidden.dtype),
            slots=slots,
            shards=shards,
            near=near,
            window_layers=self._windows.layers,
        )
        for layer in range(self._forward.num_layers):
            hidden = self._forward.layer(layer, hidden, None)
        self._context.step = None
        return hidden
