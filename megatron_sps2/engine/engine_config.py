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
    # On a CUDA device a decode step is recorded as a graph; True: every step is launched anew.
    enforce_eager: bool = False
    # A rank that sends nothing for this long is given up; one that ends is noticed at once.
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        for name in ("max_model_len", "block_size"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value} must be at least 1")
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
        per_request = -(-self.max_model_len // self.parallel.sp_size)
        if self.csa is not None:
            uneven = most_uneven(self.csa, self.max_model_len, self.parallel.sp_size)
            per_request = min(self.max_model_len, per_request + uneven)
        blocks = -(-per_request // self.block_size) + 1
        return CacheConfig(num_blocks=blocks * self.schedule.max_num_seqs, block_size=self.block_size)
