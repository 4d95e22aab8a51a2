"""Paged, sequence-sharded KV cache: the blocks that this rank holds.

Storage and block tables of one shard. Which blocks a request gets is decided by the engine's block manager on
rank 0; here a write that would pass the granted blocks is refused before anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_sps2.attention.huge_pages import prefer_huge_pages
from megatron_sps2.config import CacheConfig, KVCacheDType, KVCacheFull
from megatron_sps2.ops.paged import (
    PagedKV,
    PagedRows,
    SlotRun,
    Slots,
    gather_slots,
    put_slots,
    slot_runs,
    write_paged,
)


@dataclass(frozen=True, slots=True)
class _Swapped:
    """A request's shard in host memory: of every layer all that it stores, [n_kv, s, ...] each."""

    layers: list[list[Tensor]]
    num_tokens: int
    positions: Tensor


@dataclass(slots=True)
class BlockTable:
    """The blocks of one request in this shard, in order of its tokens here, and how many tokens they hold."""

    blocks: list[int] = field(default_factory=list)
    num_tokens: int = 0
    # Where the tokens are in the whole sequence, rising; kept only where layers see a window of it.
    positions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))


class KVCache:
    """Keys and values of every layer, each `[n_kv, num_slots, d]`, and this rank's block tables.

    With kv_cache_dtype "fp8" they are rounded as they are written, and attention must use what `read` gives.
    """

    def __init__(
        self,
        config: CacheConfig,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        kv_cache_dtype: KVCacheDType = "auto",
    ) -> None:
        self.config, self.dtype = config, dtype  # of what is written and read
        # Slots of one head lie together, so that a head's keys are one matrix [slots, d] for the kernels.
        shape = (num_kv_heads, config.tokens_per_rank, head_dim)
        self._layers = [
            _empty(shape, config.block_size, dtype, device, kv_cache_dtype) for _ in range(num_layers)
        ]
        for part in (part for layer in self._layers for part in layer.parts):
            prefer_huge_pages(part)
        self._tables: dict[int, BlockTable] = {}
        self._swapped: dict[int, _Swapped] = {}

    def num_tokens(self, request_id: int) -> int:
        """Tokens of the request in this shard."""
        table = self._tables.get(request_id)
        return table.num_tokens if table else 0

    @property
    def num_used_blocks(self) -> int:
        """Blocks in the tables of all requests; one that requests share counts for each."""
        return sum(len(table.blocks) for table in self._tables.values())

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def num_kv_heads(self) -> int:
        """Of this tp rank."""
        return self._layers[0].keys.shape[0]

    @property
    def element_size(self) -> int:
        """Bytes per element of what is written and read, which is what travels."""
        return self.dtype.itemsize

    @property
    def is_rounded(self) -> bool:
        """Whether what is read is less exact than what was written."""
        return self._layers[0].key_scales is not None

    @property
    def device(self) -> torch.device:
        return self._layers[0].keys.device

    @property
    def bytes_per_token(self) -> int:
        """K and V of one token over all layers on this rank, with their scales."""
        parts = self._layers[0].parts
        return self.num_layers * sum(part[:, :1].numel() * part.element_size() for part in parts)

    def layer(self, index: int) -> PagedKV:
        """Keys and values of a layer, from 0."""
        return self._layers[index]

    def grant(self, request_id: int, blocks: list[int]) -> None:
        """Adds `blocks` to the request's table."""
        self._tables.setdefault(request_id, BlockTable()).blocks.extend(blocks)

    def adopt(self, request_id: int, blocks: list[int]) -> None:
        """Full blocks of a shared prefix are the beginning of the request's table; they are never written."""
        self.grant(request_id, blocks)
        self._tables[request_id].num_tokens += len(blocks) * self.config.block_size

    def extend(
        self, request_id: int, num_tokens: int, positions: Sequence[int] | Tensor = ()
    ) -> list[SlotRun]:
        """Room for `num_tokens` more tokens of the request, for all layers at once; `positions`: theirs.

        Raises KVCacheFull, and changes nothing, when the granted blocks do not suffice.
        """
        table = self._tables.setdefault(request_id, BlockTable())
        first, last = table.num_tokens, table.num_tokens + num_tokens
        if last > len(table.blocks) * self.config.block_size:
            raise KVCacheFull(
                f"request {request_id} needs {last} KV slots on this rank but was granted "
                f"{len(table.blocks)} blocks of {self.config.block_size}"
            )
        table.num_tokens = last
        if len(positions):
            table.positions = torch.cat([table.positions, torch.as_tensor(positions)])
        return self.runs(request_id, first, last)

    def runs(self, request_id: int, start: int, stop: int) -> list[SlotRun]:
        """Where tokens start <= i < stop of the request's shard lie, in as few runs of slots as can be."""
        table = self._tables.get(request_id, BlockTable())
        return slot_runs(table.blocks, start, stop, self.config.block_size)

    def runs_after(self, request_id: int, position: int) -> tuple[list[SlotRun], Tensor]:
        """Where the request's tokens behind `position` lie in this shard, and their positions."""
        table = self._tables.get(request_id, BlockTable())
        first = self.first_after(request_id, position)
        return self.runs(request_id, first, table.num_tokens), table.positions[first:]

    def first_after(self, request_id: int, position: int) -> int:
        """The first of the request's tokens in this shard that lies behind `position` in the sequence."""
        table = self._tables.get(request_id, BlockTable())
        assert len(table.positions) == table.num_tokens, f"positions of request {request_id} were not kept"
        return int(torch.searchsorted(table.positions, position, right=True))

    def rows(self, request_ids: Sequence[int], starts: Sequence[int]) -> PagedRows:
        """What each request has in this shard from its token starts[i] on; for one step."""
        tables = [self._tables.get(request_id, BlockTable()) for request_id in request_ids]
        stops = [table.num_tokens for table in tables]
        return PagedRows([table.blocks for table in tables], list(starts), stops, self.config.block_size)

    def write(self, layer: int, runs: list[SlotRun], k: Tensor, v: Tensor) -> None:
        """k, v [s, n_kv, d] into the slots of `runs`, which together are s long."""
        write_paged(self.layer(layer), Slots(runs), k, v)

    def read(self, layer: int, runs: list[SlotRun]) -> tuple[Tensor, Tensor]:
        """k, v [s, 1, n_kv, d] of `runs`: a view of the cache where it can be one, else gathered."""
        return self.layer(layer).read(runs, self.dtype)

    def free(self, request_id: int) -> None:
        """Forgets the request's tokens; unknown requests are fine (a rank may hold none of its tokens)."""
        self._tables.pop(request_id, None)
        self._swapped.pop(request_id, None)

    def swap_out(self, request_id: int) -> None:
        """Copies the request's shard to host memory, page-locked beside a GPU, and forgets its blocks."""
        table = self._tables.setdefault(request_id, BlockTable())
        runs = self.runs(request_id, 0, table.num_tokens)
        layers = [[_to_host(gather_slots(part, runs)) for part in layer.parts] for layer in self._layers]
        del self._tables[request_id]
        self._swapped[request_id] = _Swapped(layers, table.num_tokens, table.positions)

    def swap_in(self, request_id: int, blocks: list[int]) -> None:
        """Brings back what swap_out took, into `blocks`."""
        swapped = self._swapped.pop(request_id)
        self.grant(request_id, blocks)
        runs = self.extend(request_id, swapped.num_tokens, swapped.positions)
        for layer, kept in zip(self._layers, swapped.layers, strict=True):
            for part, stored in zip(layer.parts, kept, strict=True):
                put_slots(part, runs, stored.to(part.device))


def _empty(
    shape: tuple[int, int, int],
    block_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    kept: KVCacheDType,
) -> PagedKV:
    """shape: [n_kv, num_slots, d]"""
    stored = dtype if kept == "auto" else torch.float8_e4m3fn
    keys, values = (torch.empty(shape, dtype=stored, device=device) for _ in range(2))
    if kept == "auto":
        return PagedKV(keys, values, block_size)
    key_scales, value_scales = (torch.empty(shape[:2], dtype=torch.float32, device=device) for _ in range(2))
    return PagedKV(keys, values, block_size, key_scales, value_scales)


def _to_host(x: Tensor) -> Tensor:
    """A copy in host memory, which the cache cannot write to."""
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
    return host.copy_(x)
