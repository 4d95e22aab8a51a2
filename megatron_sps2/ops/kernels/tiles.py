"""How a prefill's attention is cut: rows and keys of a tile, keys of a split. Plain integers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# A split reads at least this many keys for each row of a tile: what it writes and the merge reads again, 8
# bytes a number, stays near a sixteenth of the keys and values it reads, 4 bytes a number.
KEYS_PER_ROW = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Sizes of one program's tile, in rows (query x query head of a KV head) and keys, and how it is run."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


def choose_tiles(num_rows: int, head_dim: int, dtype: torch.dtype, capability: tuple[int, int]) -> Tiles:
    """For `num_rows` rows of one batch entry and KV head.

    Scores of the next tile are computed beside the softmax of this one, so both must fit into registers, 255
    a thread, with the output: that bounds the keys.
    """
    if dtype == torch.float32:  # Exact fp32 dots run without tensor cores: slow whatever the tile.
        return Tiles(rows=32, keys=32 if head_dim <= 128 else 16, num_warps=8, num_stages=1)
    if capability < (9, 0):  # No copy engine: keys come through registers.
        return Tiles(rows=64, keys=64 if head_dim <= 64 else 32, num_warps=4, num_stages=2)
    if head_dim > 128:
        return Tiles(rows=128, keys=32, num_warps=8, num_stages=2)
    if num_rows <= 64:  # One warp group's worth: the least that Hopper's matrix units take.
        return Tiles(rows=64, keys=64, num_warps=4, num_stages=3)
    return Tiles(rows=128, keys=128 if head_dim <= 64 else 64, num_warps=8, num_stages=3)


def keys_per_split(num_rows: int, num_keys: int, tiles: Tiles, num_multiprocessors: int) -> int:
    """Keys that one program reads, a multiple of tiles.keys; `num_keys` at least, where nothing is split.

    Few rows over many keys are split so that one batch entry and KV head occupies half the card. How many of
    these share the launch does not count: what one of them gives must not depend, to the bit, on the others.
    """
    num_tiles = -(-num_rows // tiles.rows)
    wanted = -(-(num_multiprocessors // 2) // num_tiles)
    most = -(-num_keys // (KEYS_PER_ROW * tiles.rows))
    num_splits = max(1, min(wanted, most))
    return -(-num_keys // (num_splits * tiles.keys)) * tiles.keys
