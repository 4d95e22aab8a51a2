"""Who gets which KV blocks, over the shards of all sp ranks. Pure Python, on rank 0 only.

Every shard has the same number of blocks; a request holds blocks in several of them. Knows no tensors.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_sps2.config import CacheConfig, KVCacheFull
from megatron_sps2.engine.prefix_cache import Place, PrefixCache, chain
from megatron_sps2.parallel.layout import TokenLayout


@dataclass(slots=True)
class _Shard:
    """One rank's part of one request."""

    blocks: list[int]
    num_tokens: int


@dataclass(slots=True)
class _Prefix:
    """Where the first full blocks of a request's prompt lie, by their number in the prompt."""

    places: dict[int, Place] = field(default_factory=dict)


class BlockManager:
    """Free lists of all shards and the blocks of every request. All or nothing: a refusal changes nothing."""

    def __init__(self, config: CacheConfig, num_ranks: int, *, prefix_caching: bool = False) -> None:
        self.config, self.prefix_caching = config, prefix_caching
        self._free = [list(range(config.num_blocks)) for _ in range(num_ranks)]
        self._requests: dict[int, list[_Shard]] = {}
        self._prefixes: dict[int, _Prefix] = {}
        self._known = PrefixCache(num_ranks)
        self._swapped: dict[int, list[int]] = {}  # tokens per rank

    @property
    def num_ranks(self) -> int:
        return len(self._free)

    @property
    def num_free_blocks(self) -> list[int]:
        """Per sp rank; those that only the prefix cache holds are free too."""
        return [len(free) + cached for free, cached in zip(self._free, self.num_cached_blocks, strict=True)]

    @property
    def num_cached_blocks(self) -> list[int]:
        """Per sp rank: free blocks that hold a prefix."""
        return [self._known.num_unused(rank) for rank in range(self.num_ranks)]

    @property
    def num_held_blocks(self) -> list[int]:
        """Per sp rank, over all requests; a block that requests share counts for each, as in their tables."""
        return [
            sum(len(shards[rank].blocks) for shards in self._requests.values())
            for rank in range(self.num_ranks)
        ]

    @property
    def num_lost_blocks(self) -> list[int]:
        """Per sp rank: blocks that are neither free nor a request's. 0 unless something is wrong."""
        held = [
            {block for shards in self._requests.values() for block in shards[rank].blocks}
            for rank in range(self.num_ranks)
        ]
        return [
            self.config.num_blocks - free - len(blocks)
            for free, blocks in zip(self.num_free_blocks, held, strict=True)
        ]

    @property
    def holders(self) -> set[int]:
        """Requests that hold blocks."""
        return set(self._requests)

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
        for rank, (count, room) in enumerate(zip(wanted, self.num_free_blocks, strict=True)):
            if count > room:
                raise KVCacheFull(
                    f"request {request_id} needs {count} KV blocks on sp rank {rank}, {room} of "
                    f"{self.config.num_blocks} are free; raise --max-model-len or wait for other requests"
                )
        for rank, (count, unused) in enumerate(zip(wanted, self._free, strict=True)):
            for _ in range(count - len(unused)):
                insort(unused, self._known.evict(rank))
        granted = []
        for shard, count, free, more in zip(shards, wanted, self._free, tokens_per_rank, strict=True):
            blocks = _take(free, count, after=shard.blocks[-1] if shard.blocks else None)
            shard.blocks.extend(blocks)
            shard.num_tokens += more
            granted.append(tuple(blocks))
        self._requests[request_id] = shards
        return tuple(granted)

    def append(self, request_id: int, home: int | None = None) -> tuple[int, int | None]:
        """Room for one token -> (sp rank, the new block there or None).

        On `home` while it has room; else in the emptiest shard that has any: the one with the fewest tokens
        of the request, so that its decode stays level too.
        """
        shards, free = self._requests[request_id], self.num_free_blocks
        order = sorted(
            range(self.num_ranks), key=lambda rank: (rank != home, shards[rank].num_tokens, -free[rank])
        )
        for rank in order:
            if free[rank] or shards[rank].num_tokens < len(shards[rank].blocks) * self.config.block_size:
                more = [int(other == rank) for other in range(self.num_ranks)]
                blocks = self.allocate(request_id, more)[rank]
                return rank, blocks[0] if blocks else None
        raise KVCacheFull(
            f"request {request_id} needs one more KV block and no shard has one; lower --max-tokens, or "
            f"raise --max-model-len (all {self.num_ranks} shards together hold {self.capacity} tokens)"
        )

    def num_cached_tokens(self, token_ids: Sequence[int], home: int | None) -> int:
        """Tokens of a prompt that the prefix cache holds, on rank `home` or on any."""
        return len(self._find(token_ids, home)) * self.config.block_size

    def adopt_prefix(self, request_id: int, token_ids: Sequence[int], home: int | None) -> list[list[int]]:
        """Gives a new request the known blocks of its prompt's beginning -> per rank, in order of position.

        The last token is always left to compute: the answer begins with its logits.
        """
        assert request_id not in self._requests, "a prefix comes before all other blocks"
        found = self._find(token_ids, home)
        shards = self._requests[request_id] = self._no_shards()
        for rank, block in found:
            self._known.use((rank, block))
            shards[rank].blocks.append(block)
            shards[rank].num_tokens += self.config.block_size
        self._prefixes[request_id] = _Prefix(dict(enumerate(found)))
        return [list(shard.blocks) for shard in shards]

    def note_layout(self, request_id: int, start: int, layout: TokenLayout) -> None:
        """Tokens from `start` on were allocated by `layout`: remembers which full blocks hold neighbours."""
        size, prefix = self.config.block_size, self._prefixes.setdefault(request_id, _Prefix())
        for rank, (held, shard) in enumerate(zip(layout.segments, self._requests[request_id], strict=True)):
            offset = shard.num_tokens - sum(map(len, held))  # of the segment, in this rank's tokens
            for segment in held:
                first, last = start + segment.start, start + segment.stop
                for number in range(-(-first // size), last // size):
                    place = offset + number * size - first
                    if place % size == 0:
                        prefix.places[number] = rank, shard.blocks[place // size]
                offset += len(segment)

    def publish_prefix(self, request_id: int, token_ids: Sequence[int]) -> None:
        """All layers of these tokens are in the cache: from now on other requests may find them."""
        places = self._prefixes.get(request_id, _Prefix()).places
        if self.prefix_caching:
            for number, digest in enumerate(chain(token_ids, self.config.block_size)):
                if number not in places:
                    return
                self._known.add(digest, places[number])

    def free(self, request_id: int) -> None:
        """Gives back all blocks of a request, on every rank; the end of a prefix is forgotten before it."""
        self._swapped.pop(request_id, None)
        self._prefixes.pop(request_id, None)
        for rank, shard in enumerate(self._requests.pop(request_id, ())):
            for block in reversed(shard.blocks):
                if not self._known.drop((rank, block)):
                    insort(self._free[rank], block)

    def swap_out(self, request_id: int) -> None:
        """Gives back a request's blocks; how many tokens each rank had is kept for swap_in."""
        tokens = self.tokens_per_rank(request_id)
        self.free(request_id)
        self._swapped[request_id] = tokens

    def swap_in(self, request_id: int, spare: int) -> tuple[tuple[int, ...], ...] | None:
        """New blocks for what was swapped out; None unless `spare` more would be left on each rank."""
        tokens, size = self._swapped[request_id], self.config.block_size
        wanted = [-(-count // size) for count in tokens]
        if any(count + spare > free for count, free in zip(wanted, self.num_free_blocks, strict=True)):
            return None
        del self._swapped[request_id]
        return self.allocate(request_id, tokens)

    def _find(self, token_ids: Sequence[int], home: int | None) -> list[Place]:
        if not self.prefix_caching:
            return []
        return self._known.find([*chain(token_ids[:-1], self.config.block_size)], home)

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
