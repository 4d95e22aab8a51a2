"""How many KV blocks fit what was measured on every rank. Pure: numbers in, CacheConfig out; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_sps2.config import CacheConfig
from megatron_sps2.engine.engine_config import EngineConfig

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """Bytes of one rank's device, its weights loaded and its cache not yet made."""

    total: int
    used: int  # by weights, libraries, and whatever else runs there
    activations: int = 0  # what the largest prefill step holds for a while

    def left(self, utilization: float) -> int:
        """For the cache, where all together may take that share of the device; below 0 where none is."""
        return int(utilization * self.total) - self.used - self.activations


def fit_cache(config: EngineConfig, block_bytes: int, rooms: Sequence[Room]) -> CacheConfig:
    """What the fullest of all ranks has room for. Raises ValueError where not even one request fits.

    `config.gpu_memory_utilization` must be given. All ranks get as many blocks: one plan is for all.
    """
    share = config.gpu_memory_utilization
    assert share is not None, "nothing says how much of the device may be used"
    rank = min(range(len(rooms)), key=lambda each: rooms[each].left(share))
    num_blocks = max(0, rooms[rank].left(share)) // block_bytes
    if num_blocks < config.fewest_blocks:
        raise ValueError(_too_small(config, block_bytes, rank, rooms[rank]))
    return CacheConfig(num_blocks=num_blocks, block_size=config.block_size)


def _too_small(config: EngineConfig, block_bytes: int, rank: int, room: Room) -> str:
    share, narrower = config.gpu_memory_utilization or 0.0, ""
    if config.kv_cache_dtype == "auto":
        narrower = ", --kv-cache-dtype fp8"
    return (
        f"rank {rank} has {_size(room.left(share))} for its KV cache ({share:g} of {_size(room.total)}, less "
        f"{_size(room.used)} used and {_size(room.activations)} for the largest prefill), but one request of "
        f"{config.max_model_len:,} tokens needs {_size(config.fewest_blocks * block_bytes)} there; use a "
        f"higher --gpu-memory-utilization, a lower --max-model-len{narrower}, or more --sp or --tp"
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:,.2f} GiB"
