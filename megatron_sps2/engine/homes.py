"""Which sp rank computes which token of a decode batch. Plain integers."""

from __future__ import annotations

from collections.abc import Sequence


def assign_homes(kv_ranks: Sequence[int], num_ranks: int, local: Sequence[bool] = ()) -> list[int]:
    """A home for each token: where its KV is kept, while no rank computes more than its share.

    A token at home where its KV is kept sends no K and V anywhere; one that is `local` never leaves, so that
    a rank with many of them may have more than its share.
    """
    share = -(-len(kv_ranks) // num_ranks)
    room = [share] * num_ranks
    homes: list[int | None] = [None] * len(kv_ranks)
    order = sorted(range(len(kv_ranks)), key=lambda i: not (local and local[i]))
    for i in order:
        rank, stays = kv_ranks[i], bool(local and local[i])
        if stays or room[rank] > 0:
            homes[i] = rank
            room[rank] -= 1
    for i, home in enumerate(homes):
        if home is None:
            homes[i] = max(range(num_ranks), key=lambda rank: room[rank])
            room[homes[i]] -= 1  # type: ignore[index]
    return [home for home in homes if home is not None]
