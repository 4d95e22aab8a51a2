"""Decode steps that are recorded once for each size of batch and replayed: no launch is paid for by the host.

Exchanges between ranks are recorded with them, so that all have rows for as many as the fullest rank has.
Knows the model and the cache, no requests.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from itertools import islice, product
from typing import Protocol

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

logger = logging.getLogger(__name__)


class Recorder(Protocol):
    """Makes what runs a body again, with the same tensors."""

    def warm_up(self, body: Callable[[], Tensor]) -> None:
        """Runs it once before: kernels are compiled, libraries and communicators are made."""
        ...

    def record(self, body: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Waits for no other rank. What it gives fills the same tensor at each call."""
        ...


def bucket_sizes(max_rows: int) -> list[int]:
    """Rows of a rank that are recorded: 1, 2, 4, then every eighth; others run in the next larger one."""
    sizes = [size for size in (1, 2, 4, *range(8, max_rows, 8)) if size < max_rows]
    return [*sizes, max_rows]


class CudaRecorder:
    """Records CUDA graphs that share their memory: one of them runs at a time."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # one for all: libraries keep a workspace for each
        self._before = self._reserved()

    @property
    def num_bytes(self) -> int:
        """Of the device's memory, kept by what was recorded while that lives."""
        return max(0, self._reserved() - self._before)

    def warm_up(self, body: Callable[[], Tensor]) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            body()
        torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, body: Callable[[], Tensor]) -> Callable[[], Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Other threads of this process may go on: NCCL's watchdog asks how its messages are.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            out = body()

        def replay() -> Tensor:
            graph.replay()
            return out

        return replay

    def _reserved(self) -> int:
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()


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
        recorder: Recorder,
    ) -> None:
        """Warms up. `max_rows` of a batch, over all sp ranks; `max_tokens` of a request.

        Recorded are twice a rank's share of the rows, for rows that stay at home may crowd on one rank.
        """
        self._forward, self._cache, self._context, self._wire = forward, cache, context, wire
        self._kernels, self._scale, self._windows = kernels, scale, windows
        block_size, num_ranks = cache.config.block_size, wire.axis.size
        self._sizes = bucket_sizes(min(max_rows, 2 * -(-max_rows // num_ranks)))
        max_blocks = -(-max_tokens // block_size) + 1
        self._batch = StaticBatch(num_ranks, self._sizes[-1], max_blocks, block_size, cache.device)
        self._sent: dict[int, dict[str, int]] = {}  # bytes of a step by its size, by collective
        self._told = False
        self._recorder = recorder
        # The largest first, so that the others find its memory.
        self._bodies = {size: partial(self._body, size) for size in reversed(self._sizes)}
        self._replays: dict[int, Callable[[], Tensor]] = {}
        for body in self._bodies.values():
            recorder.warm_up(body)

    def record(self) -> None:
        """Waits for no other rank."""
        # Gone with these graphs at once, not when a cycle is found: see Runner.forget_recorded.
        bodies, self._bodies = self._bodies, {}
        self._replays = {size: self._recorder.record(body) for size, body in bodies.items()}

    def fit(self, homes: Iterable[int]) -> bool:
        """Whether a size was recorded for as many rows, by their homes, as one rank has."""
        most = max(Counter(homes).values())
        fits = most <= self._sizes[-1]
        if not fits and not self._told:
            self._told = True
            logger.info(
                "a decode step with %d rows on one rank is launched: %d are recorded", most, self._sizes[-1]
            )
        return fits

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
    def check(self) -> str:
        """Two tokens of each row, kept on other ranks than home, replayed and launched for every size.

        For an empty cache; every rank calls this, and goes through all of it -> where the two differ on this
        rank, else "".
        """
        errors, limit = list[tuple[int, float]](), LIMITS[self._cache.dtype]
        for size, place in product(self._replays, range(min(2, self._cache.config.block_size))):
            count = min(size, self._cache.config.num_blocks // self._wire.axis.size)
            ids = [
                1 + (i + size * self._wire.axis.rank) % (self._forward.model.vocab_size - 1)
                for i in range(count)
            ]
            self._batch.fill(size, ids, [place] * count, self._trial(count, place))
            replayed = self._replays[size]()[:count].clone()
            launched = self._body(size)[:count]
            errors.append((size, relative_error(replayed, launched) if count else 0.0))
        off = [(size, error) for size, error in errors if not error <= limit]  # NaN, too
        if not off:
            return ""
        size, error = off[0]
        return f"a recorded decode step of {size} rows is off by {error:.1e}, over {limit:.0e}"

    def _trial(self, count: int, place: int) -> list[list[RowHere]]:
        """Rows of every rank: token 0 is kept on the rank after the row's home, token 1 on the next one."""
        num_ranks, me, block_size = self._wire.axis.size, self._wire.axis.rank, self._cache.config.block_size
        found = []
        for rank in range(num_ranks):
            kept = [(rank + 1 + token) % num_ranks == me for token in range(place + 1)]
            blocks = range(rank * count, (rank + 1) * count)
            found.append(
                [
                    RowHere(
                        block * block_size + sum(kept) - 1 if kept[-1] else NO_SLOT, [block], 0, sum(kept)
                    )
                    for block in blocks
                ]
            )
        return found

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
