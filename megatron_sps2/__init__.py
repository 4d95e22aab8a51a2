"""Sequence-parallel serving of long prompts on Megatron-core layers."""

from megatron_sps2.config import (
    AttentionConfig,
    CacheConfig,
    KVCacheFull,
    ModelConfig,
    ParallelConfig,
    SamplingParams,
)

__version__ = "0.1.0"

__all__ = [
    "AttentionConfig",
    "CacheConfig",
    "KVCacheFull",
    "ModelConfig",
    "ParallelConfig",
    "SamplingParams",
    "__version__",
]
