"""Which blocks hold which prefixes: what a prompt shares with an earlier one is not computed again.

A block is known by the tokens it holds and all before them (a chain of digests). Blocks that no request
uses any more stay findable until their room is needed; those unused the longest go first. Pure Python.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence

Place = tuple[int, int]  # sp rank, block


def chain(token_ids: Sequence[int], block_size: int) -> Iterator[bytes]:
    """One digest for each full block of `token_ids`: of its tokens and of every token before them."""
    before = b""
    for stop in range(block_size, len(token_ids) + 1, block_size):
        tokens = array("q", token_ids[stop - block_size : stop]).tobytes()
        before = hashlib.blake2b(before + tokens, digest_size=16).digest()
        yield before


class PrefixCache:
    """Digest -> blocks. Counts who uses a block; knows neither requests nor free lists."""

    def __init__(self, num_ranks: int) -> None:
        self._places: dict[bytes, dict[int, int]] = {}  # digest -> rank -> block
        self._digests: dict[Place, bytes] = {}
        self._users: Counter[Place] = Counter()
        self._unused: list[OrderedDict[int, None]] = [OrderedDict() for _ in range(num_ranks)]

    def num_unused(self, rank: int) -> int:
        """Blocks of a rank that nobody uses and that can be evicted."""
        return len(self._unused[rank])

    def find(self, digests: Sequence[bytes], home: int | None) -> list[Place]:
        """The blocks of the longest known beginning of `digests`; only on rank `home` if it is given."""
        found = []
        for digest in digests:
            places = self._places.get(digest, {})
            rank = home if home in places else next(iter(places), None) if home is None else None
            if rank is None:
                break
            found.append((rank, places[rank]))
        return found

    def use(self, place: Place) -> None:
        """One more request uses a known block."""
        self._users[place] += 1
        self._unused[place[0]].pop(place[1], None)

    def add(self, digest: bytes, place: Place) -> None:
        """A block that one request uses and has filled; nothing happens if the rank has one like it."""
        known = self._places.setdefault(digest, {})
        if place[0] not in known and place not in self._digests:
            known[place[0]] = place[1]
            self._digests[place] = digest
            self._users[place] = 1

    def drop(self, place: Place) -> bool:
        """One request less uses a block -> whether it stays here, to be found or evicted."""
        if place not in self._digests:
            return False
        self._users[place] -= 1
        if not self._users[place]:
            del self._users[place]
            self._unused[place[0]][place[1]] = None
        return True

    def evict(self, rank: int) -> int:
        """Forgets the block of a rank that has been unused the longest -> its number."""
        block, _ = self._unused[rank].popitem(last=False)
        digest = self._digests.pop((rank, block))
        places = self._places[digest]
        del places[rank]
        if not places:
            del self._places[digest]
        return block
