"""Sequence-parallel serving of long prompts on Megatron-core layers."""

from typing import TYPE_CHECKING, Any

from megatron_sps2.config import (
    AttentionConfig,
    CacheConfig,
    KVCacheFull,
    ModelConfig,
    ParallelConfig,
    SamplingParams,
    ScheduleConfig,
)

if TYPE_CHECKING:
    from megatron_sps2.llm import LLM

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "AttentionConfig",
    "CacheConfig",
    "KVCacheFull",
    "ModelConfig",
    "ParallelConfig",
    "SamplingParams",
    "ScheduleConfig",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """LLM comes with its first use: it stands on every floor of the house, and the others need not."""
    if name == "LLM":
        from megatron_sps2.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
