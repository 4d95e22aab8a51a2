"""All settings of an engine. Plain data: no torch, so that a process that only watches may read them."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron_sps2.attention.strategy import most_uneven
from megatron_sps2.config import (
    KV_CACHE_DTYPES,
    AttentionConfig,
    CacheConfig,
    DType,
    KVCacheDType,
    ParallelConfig,
    ScheduleConfig,
)
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
    # What keys and values are rounded to as they are cached; attention of every step reads them so.
    kv_cache_dtype: KVCacheDType = "auto"
    # Tokens of one request at most (prompt and answer); the cache has room for one such at least.
    max_model_len: int = 4096
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    cache: CacheConfig | None = None
    block_size: int = 64
    # With a CUDA device and no `cache`: the share of its memory that all together may take; the cache is what
    # weights and the largest prefill leave of it. None: the cache is what max_num_seqs requests need.
    gpu_memory_utilization: float | None = None
    device: str = "cpu"
    # On a CUDA device a decode step is recorded as a graph; True: every step is launched anew.
    enforce_eager: bool = False
    # A rank that sends nothing for this long is given up; one that ends is noticed at once.
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        for name in ("max_model_len", "block_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if self.kv_cache_dtype not in KV_CACHE_DTYPES:
            known = ", ".join(KV_CACHE_DTYPES)
            raise ValueError(f"kv_cache_dtype={self.kv_cache_dtype!r} is not known; use one of {known}")
        if self.gpu_memory_utilization is not None and not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"gpu_memory_utilization={self.gpu_memory_utilization} must be above 0 and at most 1"
            )
        if self.schedule.policy == "sarathi":
            self._check_chunks()
        if self.attention.mode != "exact" and self.csa is None:
            raise ValueError(
                f"attention mode {self.attention.mode!r} needs a CSA setting; give csa=PRESETS['default']"
            )

    def _check_chunks(self) -> None:
        """Chunks of a prompt follow what is cached of it: exactly, and by pass_q."""
        if self.attention.mode != "exact":
            raise ValueError(
                f"attention mode {self.attention.mode!r} needs whole prompts, policy 'sarathi' cuts them in "
                "chunks; use --attention exact, or --policy sps2 or fcfs"
            )
        if self.attention.strategy not in ("auto", "pass_q"):
            raise ValueError(
                f"strategy {self.attention.strategy!r} cannot follow a cached context, as chunks of policy "
                "'sarathi' do; use --strategy auto or pass_q"
            )

    def sized_cache(self) -> CacheConfig:
        """The cache as given, or one for max_num_seqs requests of max_model_len tokens over all shards."""
        if self.cache:
            return self.cache
        num_blocks = self._blocks_per_request * self.schedule.max_num_seqs
        return CacheConfig(num_blocks=num_blocks, block_size=self.block_size)

    @property
    def fewest_blocks(self) -> int:
        """Of a rank, with which one request of max_model_len tokens is served by any policy."""
        return self._blocks_per_request + 1  # chunks may end in the middle of a block

    @property
    def _blocks_per_request(self) -> int:
        per_request = -(-self.max_model_len // self.parallel.sp_size)
        if self.csa is not None:
            uneven = most_uneven(self.csa, self.max_model_len, self.parallel.sp_size)
            per_request = min(self.max_model_len, per_request + uneven)
        return -(-per_request // self.block_size) + 1
