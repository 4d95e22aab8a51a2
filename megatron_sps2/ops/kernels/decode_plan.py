"""How decode attention is cut into work: plain integers, for the host's bounds and the kernels' constants."""

from __future__ import annotations

# A row is cut into splits of a multiple of so many tokens: short enough that rows of a few thousand tokens
# fill the device, long enough that a split's fp32 result is a percent or two of what it reads.
MIN_SPLIT_TOKENS = 256
# Splits that a row of many tokens has over all its KV heads: about two waves of the programs that fit on a
# device of 132 multiprocessors.
SPLITS_PER_ROW = 1024
# Joining holds all splits of a head in registers.
MIN_SPLITS, MAX_SPLITS = 16, 256
# Programs walk through the splits of all rows. More than are resident (two or three) level what splits of
# unequal lengths leave uneven; beyond that they would only cost their start.
PROGRAMS_PER_MULTIPROCESSOR = 8
# Tokens and bytes of a tile of keys, at most; float8 gets half the bytes, as more leave too few registers.
MAX_TILE_TOKENS = 64
TILE_BYTES = 16 * 1024
# Bytes of the tiles of keys and values that are on their way or in use: two to three programs fit on a
# multiprocessor, and together have more on their way than hides what memory takes to answer.
STAGED_BYTES = 64 * 1024


def max_splits(num_kv_heads: int) -> int:
    """The most splits that a row is cut into per KV head, a power of two; the same for every batch."""
    per_head = max(1, SPLITS_PER_ROW // num_kv_heads)
    return min(MAX_SPLITS, max(MIN_SPLITS, 1 << per_head.bit_length() - 1))


def num_splits_bound(max_tokens: int, most: int) -> int:
    """Splits that no row of at most `max_tokens` exceeds."""
    return min(most, -(-max_tokens // MIN_SPLIT_TOKENS))


def tile_tokens(head_dim: int, element_size: int) -> int:
    """Tokens of one tile, a power of two; `element_size` bytes each number."""
    return min(MAX_TILE_TOKENS, max(16, TILE_BYTES // (_padded(head_dim) * max(2, element_size))))


def num_stages(head_dim: int, element_size: int) -> int:
    """Triton's stages of the loop over tiles: tiles held at a time, and one."""
    tile_bytes = 2 * tile_tokens(head_dim, element_size) * _padded(head_dim) * element_size
    return 1 + max(2, STAGED_BYTES // tile_bytes)


def num_programs(num_splits: int, num_multiprocessors: int) -> int:
    """Programs for at most so many splits, of all rows and KV heads."""
    return min(num_splits, PROGRAMS_PER_MULTIPROCESSOR * num_multiprocessors)


def _padded(head_dim: int) -> int:
    return max(16, 1 << (head_dim - 1).bit_length())
