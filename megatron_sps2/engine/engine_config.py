"""All settings of an engine. Plain data: no torch, so that a process that only watches may read them."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_sps2.attention.strategy import most_uneven
from megatron_sps2.config import AttentionConfig, CacheConfig, DType, ParallelConfig, ScheduleConfig
from megatron_sps2.csa_setting import CsaSetting


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """All that every rank must be told alike."""

    checkpoint: str
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    # What CSA keeps; with None no request can run with it, and the cache needs no room for its layout.
    csa: CsaSetting | None = None
    dtype: DType = "float32"
    # Tokens of one request at most (prompt and answer); the cache is sized for it unless `cache` is given.
    max_model_len: int = 4096
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    cache: CacheConfig | None = None
    block_size: int = 64
    device: str = "cpu"
    # A rank that sends nothing for this long is given up; one that ends is noticed at once.
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        for name in ("max_model_len", "block_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.attention.mode != "exact" and self.csa is None:
            raise ValueError(
                f"attention mode {self.attention.mode!r} needs a CSA setting; give csa=PRESETS['default']"
            )

    def sized_cache(self) -> CacheConfig:
        """The cache as given, or one for max_num_seqs requests of max_model_len tokens over all shards."""
        if self.cache:
            return self.cache
        per_request = -(-self.max_model_len // self.parallel.sp_size)
        if self.csa is not None:
            uneven = most_uneven(self.csa, self.max_model_len, self.parallel.sp_size)
            per_request = min(self.max_model_len, per_request + uneven)
        blocks = -(-per_request // self.block_size) + 1
        return CacheConfig(num_blocks=blocks * self.schedule.max_num_seqs, block_size=self.block_size)
