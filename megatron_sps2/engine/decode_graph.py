"""Decode steps that are recorded once for each size of batch and replayed: no launch is paid for by the host.

Exchanges between ranks are recorded with them, so that all have rows for as many as the fullest rank has.
Knows the model and the cache, no requests.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from itertools import islice

import torch
from torch import Tensor

from megatron_sps2.attention.core import StepContext
from megatron_sps2.attention.decode import DecodeStep, RowHere
from megatron_sps2.attention.kv_cache import KVCache
from megatron_sps2.attention.static_decode import StaticBatch, StaticDecodeStep
from megatron_sps2.attention.window import Windows
from megatron_sps2.engine.kernel_check import LIMITS, relative_error
from megatron_sps2.model.gpt import GptForward
from megatron_sps2.ops.kernel_set import Kernels
from megatron_sps2.ops.paged import NO_SLOT
from megatron_sps2.parallel.collectives import Wire

# Runs what it is given and gives a function that does so again, into the same tensor.
Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


def bucket_sizes(max_rows: int) -> list[int]:
    """Rows of a rank that are recorded: 1, 2, 4, then every eighth; others run in the next larger one."""
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
        # Other threads of this process may go on: NCCL's watchdog asks how its messages are.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            out = body()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay


class DecodeGraphs:
    """All recorded sizes, over one set of tensors. Made and run by all ranks of a replica together."""

    def __init__(
        self,
        forward: GptForward,
        cache: KVCache,
        context: StepContext,
        kernels: Kernels,
        wire: Wire,
        *,
        max_rows: int,
        max_tokens: int,
        scale: float,
        windows: Windows,
        record: Record,
    ) -> None:
        """`max_rows` of a batch, over all sp ranks; `max_tokens` of a request."""
        self._forward, self._cache, self._context, self._wire = forward, cache, context, wire
        self._kernels, self._scale, self._windows = kernels, scale, windows
        block_size, num_ranks = cache.config.block_size, wire.axis.size
        self._sizes = bucket_sizes(-(-max_rows // num_ranks))
        max_blocks = -(-max_tokens // block_size) + 1
        self._batch = StaticBatch(num_ranks, self._sizes[-1], max_blocks, block_size, cache.device)
        self._sent: dict[int, dict[str, int]] = {}  # bytes of a step by its size, by collective
        # The largest first, so that the others find its memory.
        self._replays = {size: record(partial(self._body, size)) for size in reversed(self._sizes)}

    def fit(self, homes: list[int]) -> bool:
        """Whether a size was recorded for as many rows, by their homes, as one rank has: more are rare."""
        return max(map(homes.count, homes)) <= self._sizes[-1]

    def run(self, token_ids: list[int], positions: list[int], step: DecodeStep) -> Tensor:
        """A batch whose room `step` has made -> hidden [b, 1, h] after the last layer, for now.

        Token ids, positions and hidden are those of the rows at home here.
        """
        here, counts = iter(step.here()), step.home_counts
        size = self._sizes[bisect_left(self._sizes, max(counts))]
        self._batch.fill(size, token_ids, positions, [[*islice(here, count)] for count in counts])
        for collective, num_bytes in self._sent[size].items():
            self._wire.ledger.add(collective, num_bytes)
        return self._replays[size]()[: len(token_ids)]

    @torch.inference_mode()
    def check(self) -> None:
        """Replays every size and launches it, on rows that are kept on the rank after their home's.

        For an empty cache; every rank calls this. Raises RuntimeError on a rank where the two differ.
        """
        config, num_ranks, me = self._cache.config, self._wire.axis.size, self._wire.axis.rank
        for size, replay in self._replays.items():
            count = min(size, config.num_blocks)
            rows = [[RowHere(NO_SLOT, [], 0, 0)] * count for _ in range(num_ranks)]
            rows[me - 1] = [RowHere(i * config.block_size, [i], 0, 1) for i in range(count)]
            self._batch.fill(size, [1] * count, [0] * count, rows)
            replayed = replay()[:count].clone()
            error = relative_error(replayed, self._body(size)[:count])
            if not error <= LIMITS[replayed.dtype]:  # NaN, too
                raise RuntimeError(
                    f"a recorded decode step of {size} rows is off by {error:.1e}, over "
                    f"{LIMITS[replayed.dtype]:.0e}; use --enforce-eager, and report it"
                )

    @torch.inference_mode()
    def _body(self, size: int) -> Tensor:
        ids, places = self._batch.inputs(size)
        slots, shards, near = self._batch.rows(size)
        with self._wire.ledger.aside() as self._sent[size]:
            hidden, angles = self._forward.embed(ids, places), self._forward.angles(places)
            self._context.step = StaticDecodeStep(
                cache=self._cache,
                wire=self._wire,
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
