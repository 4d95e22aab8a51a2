"""Who gets which KV blocks, over the shards of all sp ranks. Pure Python, on rank 0 only.

Every shard has the same number of blocks; a request holds blocks in several of them. Knows no tensors.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sps2.config import CacheConfig, KVCacheFull


@dataclass(slots=True)
class _Shard:
    """One rank's part of one request."""

    blocks: list[int]
    num_tokens: int


class BlockManager:
    """Free lists of all shards and the blocks of every request. All or nothing: a refusal changes nothing."""

    def __init__(self, config: CacheConfig, num_ranks: int) -> None:
        self.config = config
        self._free = [list(range(config.num_blocks)) for _ in range(num_ranks)]
        self._requests: dict[int, list[_Shard]] = {}

    @property
    def num_ranks(self) -> int:
        return len(self._free)

    @property
    def num_free_blocks(self) -> list[int]:
        """Per sp rank."""
        return [len(free) for free in self._free]

    @property
    def capacity(self) -> int:
        """Tokens that fit in all shards together."""
        return self.num_ranks * self.config.tokens_per_rank

    def tokens_per_rank(self, request_id: int) -> list[int]:
        return [shard.num_tokens for shard in self._requests.get(request_id, self._no_shards())]

    def blocks_per_rank(self, request_id: int) -> list[int]:
        """Blocks that the request holds."""
        return [len(shard.blocks) for shard in self._requests.get(request_id, self._no_shards())]

    def most_blocks(self, request_id: int, more: Sequence[int], num_appended: int) -> list[int]:
        """Blocks that the request may come to hold on each rank: allocate(more), then num_appended appends.

        Exact but for which of equally full shards gets the last tokens.
        """
        tokens = [held + new for held, new in zip(self.tokens_per_rank(request_id), more, strict=True)]
        level = fill_level(tokens, num_appended)
        return [-(-max(count, level) // self.config.block_size) for count in tokens]

    def allocate(self, request_id: int, tokens_per_rank: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Room for tokens_per_rank[r] more tokens on rank r -> the new blocks of each rank.

        Raises KVCacheFull naming the shard that is short, and changes nothing.
        """
        shards = self._requests.get(request_id, self._no_shards())
        wanted = [
            max(0, -(-(shard.num_tokens + more) // self.config.block_size) - len(shard.blocks))
            for shard, more in zip(shards, tokens_per_rank, strict=True)
        ]
        for rank, (count, free) in enumerate(zip(wanted, self._free, strict=True)):
            if count > len(free):
                raise KVCacheFull(
                    f"request {request_id} needs {count} KV blocks on sp rank {rank}, {len(free)} of "
                    f"{self.config.num_blocks} are free; raise --max-model-len or wait for other requests"
                )
        granted = []
        for shard, count, free, more in zip(shards, wanted, self._free, tokens_per_rank, strict=True):
            blocks = _take(free, count, after=shard.blocks[-1] if shard.blocks else None)
            shard.blocks.extend(blocks)
            shard.num_tokens += more
            granted.append(tuple(blocks))
        self._requests[request_id] = shards
        return tuple(granted)

    def append(self, request_id: int) -> tuple[int, int | None]:
        """Room for one token in the emptiest shard that has any -> (sp rank, the new block there or None).

        The emptiest is the one with the fewest tokens of the request, so that its decode stays level too.
        """
        shards = self._requests[request_id]
        order = sorted(
            range(self.num_ranks), key=lambda rank: (shards[rank].num_tokens, -len(self._free[rank]))
        )
        for rank in order:
            if (
                self._free[rank]
                or shards[rank].num_tokens < len(shards[rank].blocks) * self.config.block_size
            ):
                more = [int(other == rank) for other in range(self.num_ranks)]
                blocks = self.allocate(request_id, more)[rank]
                return rank, blocks[0] if blocks else None
        raise KVCacheFull(
            f"request {request_id} needs one more KV block and no shard has one; lower --max-tokens, or "
            f"raise --max-model-len (all {self.num_ranks} shards together hold {self.capacity} tokens)"
        )

    def free(self, request_id: int) -> None:
        """Gives back all blocks of a request, on every rank."""
        for free, shard in zip(self._free, self._requests.pop(request_id, ()), strict=False):
            for block in shard.blocks:
                insort(free, block)

    def _no_shards(self) -> list[_Shard]:
        return [_Shard([], 0) for _ in range(self.num_ranks)]


def fill_level(tokens: Sequence[int], num_appended: int) -> int:
    """Tokens in the fullest shard that gets any of `num_appended`, each put into the emptiest; 0 for none."""
    if num_appended == 0:
        return 0
    lowest = sorted(tokens)
    for count in range(len(lowest), 1, -1):
        level = -(-(sum(lowest[:count]) + num_appended) // count)
        if level >= lowest[count - 1]:
            return level
    return lowest[0] + num_appended


def _take(free: list[int], count: int, after: int | None) -> list[int]:
    """Removes `count` blocks from the sorted free list; neighbours if it can, as they are read as one run."""
    if count == 0:
        return []
    first = _run_start(free, count, after)
    taken = free[first : first + count]
    del free[first : first + count]
    return taken


def _run_start(free: list[int], count: int, after: int | None) -> int:
    if after is not None and after + 1 in free:
        return min(free.index(after + 1), len(free) - count)
    for start in range(len(free) - count + 1):
        if free[start + count - 1] - free[start] == count - 1:
            return start
    return 0
