"""Shapes of well-known models by name, so that a model can be planned for without its weights."""

from __future__ import annotations

from pathlib import Path

from megatron_sps2.config import ModelConfig
from megatron_sps2.model.manifest import load_model_config

# Longer prompts than a model was trained for can still be asked about.
LONGEST = 2**21


def _shape(
    num_layers: int,
    hidden_size: int,
    ffn_hidden_size: int,
    heads: tuple[int, int],
    vocab_size: int,
    head_dim: int = 128,
    experts: tuple[int, int] = (0, 0),
    *,
    qk_norm: bool = False,
) -> ModelConfig:
    return ModelConfig(
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        num_attention_heads=heads[0],
        num_query_groups=heads[1],
        head_dim=head_dim,
        vocab_size=vocab_size,
        max_seq_len=LONGEST,
        num_experts=experts[0],
        experts_per_token=experts[1],
        qk_norm=qk_norm,
    )


SHAPES: dict[str, ModelConfig] = {
    "llama2-7b": _shape(32, 4096, 11008, (32, 32), 32000),
    "llama3-8b": _shape(32, 4096, 14336, (32, 8), 128256),
    "llama3-70b": _shape(80, 8192, 28672, (64, 8), 128256),
    "llama3-405b": _shape(126, 16384, 53248, (128, 8), 128256),
    "mistral-7b": _shape(32, 4096, 14336, (32, 8), 32768),
    "mixtral-8x7b": _shape(32, 4096, 14336, (32, 8), 32000, experts=(8, 2)),
    "qwen3-8b": _shape(36, 4096, 12288, (32, 8), 151936, qk_norm=True),
    "qwen3-32b": _shape(64, 5120, 25600, (64, 8), 151936, qk_norm=True),
    "phi3-mini": _shape(32, 3072, 8192, (32, 32), 32064, head_dim=96),
}


def load_shape(name_or_folder: str) -> ModelConfig:
    """A shape by name, or that of a checkpoint. Raises FileNotFoundError or ValueError."""
    if name_or_folder in SHAPES:
        return SHAPES[name_or_folder]
    if not Path(name_or_folder).is_dir():
        raise FileNotFoundError(
            f"model {name_or_folder!r} is none of {', '.join(SHAPES)} and no checkpoint's folder"
        )
    return load_model_config(name_or_folder)
