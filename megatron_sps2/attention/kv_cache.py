"""Paged, sequence-sharded KV cache: the blocks that this rank holds.

Storage and block tables of one shard. Which blocks a request gets is decided by the engine's block manager on
rank 0; here a write that would pass the granted blocks is refused before anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_sps2.attention.slots import SlotRun, Slots
from megatron_sps2.config import CacheConfig, KVCacheDType, KVCacheFull

__all__ = ["BlockTable", "KVCache", "SlotRun"]


@dataclass(frozen=True, slots=True)
class _Swapped:
    """A request's shard in host memory: what is stored of every layer's keys, and of its values."""

    layers: list[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]
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
    """Keys and values of every layer, `[n_kv, num_slots, d]` each, and this rank's block tables.

    With kv_cache_dtype "fp8" they are rounded as they are written, and read so. Attention must use what
    `write` gives back, or a token would depend on which keys were in the cache when it attended.
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
        self.config, self.num_kv_heads = config, num_kv_heads  # of this tp rank
        shape = (num_kv_heads, config.tokens_per_rank, head_dim)
        self._keys, self._values = (
            [Slots.empty(shape, dtype, device, kv_cache_dtype) for _ in range(num_layers)] for _ in range(2)
        )
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
        return len(self._keys)

    @property
    def element_size(self) -> int:
        """Bytes per element of what is written and read, which is what travels."""
        return self._keys[0].dtype.itemsize

    @property
    def device(self) -> torch.device:
        return self._keys[0].rows.device

    @property
    def bytes_per_token(self) -> int:
        """K and V of one token over all layers on this rank, with their scales."""
        return sum(slots.bytes_per_slot for slots in (*self._keys, *self._values))

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
        size, found = self.config.block_size, list[SlotRun]()
        table = self._tables.get(request_id, BlockTable())
        while start < stop:
            slot = table.blocks[start // size] * size + start % size
            count = min(stop - start, size - start % size)
            if found and found[-1].stop == slot:
                found[-1] = SlotRun(found[-1].start, slot + count)
            else:
                found.append(SlotRun(slot, slot + count))
            start += count
        return found

    def runs_after(self, request_id: int, position: int) -> tuple[list[SlotRun], Tensor]:
        """Where the request's tokens behind `position` lie in this shard, and their positions."""
        table = self._tables.get(request_id, BlockTable())
        assert len(table.positions) == table.num_tokens, f"positions of request {request_id} were not kept"
        first = int(torch.searchsorted(table.positions, position, right=True))
        return self.runs(request_id, first, table.num_tokens), table.positions[first:]

    def write(self, layer: int, runs: list[SlotRun], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [s, n_kv, d] into the slots of `runs`, together s long -> k, v as the cache has them."""
        return self._keys[layer].write(runs, k), self._values[layer].write(runs, v)

    def read(self, layer: int, runs: list[SlotRun]) -> tuple[Tensor, Tensor]:
        """k, v [s, 1, n_kv, d] of `runs`: a view of the cache where it can be one, see `Slots.read`."""
        return self._keys[layer].read(runs), self._values[layer].read(runs)

    def free(self, request_id: int) -> None:
        """Forgets the request's tokens; unknown requests are fine (a rank may hold none of its tokens)."""
        self._tables.pop(request_id, None)
        self._swapped.pop(request_id, None)

    def swap_out(self, request_id: int) -> None:
        """Copies the request's shard to host memory, page-locked beside a GPU, and forgets its blocks."""
        table = self._tables.setdefault(request_id, BlockTable())
        runs = self.runs(request_id, 0, table.num_tokens)
        layers = [
            (keys.to_host(runs), values.to_host(runs))
            for keys, values in zip(self._keys, self._values, strict=True)
        ]
        del self._tables[request_id]
        self._swapped[request_id] = _Swapped(layers, table.num_tokens, table.positions)

    def swap_in(self, request_id: int, blocks: list[int]) -> None:
        """Brings back what swap_out took, into `blocks`."""
        swapped = self._swapped.pop(request_id)
        self.grant(request_id, blocks)
        runs = self.extend(request_id, swapped.num_tokens, swapped.positions)
        for layer, (keys, values) in enumerate(swapped.layers):
            self._keys[layer].from_host(runs, keys)
            self._values[layer].from_host(runs, values)
