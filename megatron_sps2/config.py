"""Frozen configuration: model, ranks, attention, cache, sampling.

Plain data and its checks. Knows no torch, no process group, no file format.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

KERNEL_CHOICES = ("auto", "torch", "numba", "triton")
PREFILL_STRATEGIES = ("auto", "ulysses", "pass_kv", "pass_q")
ATTENTION_MODES = ("exact", "csa", "auto")
POLICY_NAMES = ("sps2", "sarathi", "fcfs")
PREEMPTION_MODES = ("recompute", "swap")
DTYPES = ("float32", "bfloat16", "float16")
KV_CACHE_DTYPES = ("auto", "fp8")
CHECKPOINT_FORMATS = ("megatron", "hf", "megatron-legacy")
ROPE_SCALINGS = ("linear", "llama3", "yarn")

# Likeliest tokens that are reported beside a chosen one, at most.
MAX_LOGPROBS = 20

KernelChoice = Literal["auto", "torch", "numba", "triton"]
PrefillStrategy = Literal["auto", "ulysses", "pass_kv", "pass_q"]
PolicyName = Literal["sps2", "sarathi", "fcfs"]
PreemptionMode = Literal["recompute", "swap"]
AttentionMode = Literal["exact", "csa", "auto"]
CheckpointFormat = Literal["megatron", "hf", "megatron-legacy"]
DType = Literal["float32", "bfloat16", "float16"]
# Of what the cache keeps. auto: the model's; fp8: float8_e4m3 with an fp32 scale for each token and KV head.
KVCacheDType = Literal["auto", "fp8"]

# Tokens of a step where nothing is said. Sarathi's chunk is small, so that decodes in its step stay fast.
BATCHED_TOKENS: dict[PolicyName, int] = {"sps2": 2048, "sarathi": 512, "fcfs": 4096}


def _require_positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")


def _require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is not known; use one of {', '.join(choices)}")


def divisors(*counts: int) -> list[int]:
    """Every integer that divides all of `counts`, for the 'use 1, 2 or 4' part of an error."""
    return [k for k in range(1, min(counts) + 1) if all(count % k == 0 for count in counts)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than a model was first trained on.

    linear: all by `factor`. llama3: long waves by `factor`, short ones not, smooth between. yarn: by the
    turns that a wave makes within `original_max_seq_len`, and logits grow by `attention_factor` squared.
    """

    kind: Literal["linear", "llama3", "yarn"]
    factor: float
    original_max_seq_len: int
    low_freq_factor: float = 1.0  # llama3: waves longer than the original length / this are stretched
    high_freq_factor: float = 4.0  # llama3: waves shorter than the original length / this are not
    beta_fast: float = 32.0  # yarn: waves with more turns than this are not stretched
    beta_slow: float = 1.0  # yarn: waves with fewer turns than this are
    attention_factor: float = 1.0
    truncate: bool = True  # yarn: the ramp begins and ends at whole dimensions

    def __post_init__(self) -> None:
        _require_choice("rope_scaling", self.kind, ROPE_SCALINGS)
        _require_positive(self, "original_max_seq_len")
        for name in ("factor", "beta_fast", "beta_slow", "low_freq_factor", "attention_factor"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"rope_scaling: {name}={getattr(self, name)} must be above 0 and finite")
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope_scaling: low_freq_factor={self.low_freq_factor} must be below "
                f"high_freq_factor={self.high_freq_factor}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Shape of a decoder. The defaults are Llama's: RMSNorm, RoPE, GQA, SwiGLU, no biases.

    Names are Megatron's; `num_query_groups` is what Hugging Face calls num_key_value_heads.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_seq_len: int
    norm_epsilon: float = 1e-5
    rotary_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    no_rope_layers: tuple[int, ...] = ()  # layers, from 0, whose queries and keys are not turned (SmolLM3)
    # Layers, from 0, whose tokens see only the last `window` tokens, themselves included (Mistral, Gemma 3).
    window: int | None = None
    window_layers: tuple[int, ...] = ()
    window_rotary_base: float | None = None  # of those layers, without scaling; None: as all others (Gemma 3)
    qkv_bias: bool = False  # Qwen2
    qk_norm: bool = False  # RMSNorm over each head's query and key, before they are turned (Qwen3)
    # Mixtral and Qwen3-MoE: every MLP is a mixture of so many, of ffn_hidden_size each; 0: one dense MLP.
    num_experts: int = 0
    experts_per_token: int = 0
    # True: the chosen experts' weights add up to 1; False: they are those of the softmax over all.
    normalize_experts: bool = True
    # Gemma 3, with gelu_tanh: norms after attention and MLP too, all norms' weights stored less 1, embeddings
    # times sqrt(hidden_size).
    is_gemma: bool = False
    attention_scalar: int | None = None  # logits are divided by its square root; None: head_dim
    # GPT-2 and GPT-3: all five together.
    norm: Literal["rms", "layer"] = "rms"
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    gated: bool = True  # the MLP's first linear gives a gate as well
    linear_bias: bool = False  # of all linears
    learned_positions: bool = False  # added to the embedding; no RoPE
    # True: the output layer reuses the embedding matrix (Hugging Face tie_word_embeddings).
    tie_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _require_positive(
            self,
            *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"),
            *("num_query_groups", "head_dim", "vocab_size", "max_seq_len"),
        )
        for name in ("norm_epsilon", "rotary_base"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_query_groups={self.num_query_groups}; every KV head must serve the same number of "
                f"query heads, use {divisors(self.num_attention_heads)}"
            )
        _require_choice("norm", self.norm, ("rms", "layer"))
        _require_choice("activation", self.activation, ("silu", "gelu", "gelu_tanh"))
        gpt2 = (self.norm == "layer", not self.gated, self.linear_bias)
        is_gelu = self.activation != "silu"
        if any(each != self.learned_positions for each in gpt2) or is_gelu != (
            self.learned_positions or self.is_gemma
        ):
            raise ValueError(
                f"norm={self.norm!r}, activation={self.activation!r}, gated={self.gated}, linear_bias="
                f"{self.linear_bias} and learned_positions={self.learned_positions} are not served together: "
                "either RMSNorm, SiLU, gated, no biases and rotary positions (Llama; Gemma has GELU), or "
                "LayerNorm, GELU, not gated, biases and learned positions (GPT-2)"
            )
        self._check_experts()
        self._check_windows()
        if self.head_dim % 2 and not self.learned_positions:
            raise ValueError(f"head_dim={self.head_dim} is odd; rotary positions need an even head_dim")
        if any(not 0 <= layer < self.num_layers for layer in self.no_rope_layers):
            raise ValueError(
                f"no_rope_layers={self.no_rope_layers} must lie between 0 and {self.num_layers - 1}"
            )

    def _check_experts(self) -> None:
        if not 0 <= self.experts_per_token <= self.num_experts or bool(self.experts_per_token) != bool(
            self.num_experts
        ):
            raise ValueError(
                f"experts_per_token={self.experts_per_token} must lie between 1 and num_experts="
                f"{self.num_experts}, or both be 0"
            )
        if self.experts_per_token == 1 and self.normalize_experts:
            raise ValueError(
                "experts_per_token=1 with normalize_experts would give every expert the weight 1, which "
                "Megatron's router refuses; set normalize_experts=False"
            )
        if self.num_experts and self.learned_positions:
            raise ValueError(f"num_experts={self.num_experts} is not served with learned_positions")

    def _check_windows(self) -> None:
        if (self.window is None) != (not self.window_layers) or (self.window is not None and self.window < 1):
            raise ValueError(
                f"window={self.window} and window_layers={self.window_layers} must both be given, or neither;"
                " a window holds at least 1 token"
            )
        if self.window_rotary_base is not None and not self.window_layers:
            raise ValueError(f"window_rotary_base={self.window_rotary_base} needs window_layers")
        if any(not 0 <= layer < self.num_layers for layer in self.window_layers):
            raise ValueError(
                f"window_layers={self.window_layers} must lie between 0 and {self.num_layers - 1}"
            )
        for name in ("window_rotary_base", "attention_scalar"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name}={value} must be above 0")

    @property
    def queries_per_group(self) -> int:
        """Query heads that share one KV head."""
        return self.num_attention_heads // self.num_query_groups

    @property
    def softmax_scale(self) -> float:
        """What logits are multiplied with; yarn's factor belongs to queries and keys alike."""
        stretch = self.rope_scaling.attention_factor if self.rope_scaling else 1.0
        return (self.attention_scalar or self.head_dim) ** -0.5 * stretch**2


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """The rank grid: world_size = dp_size x sp_size x tp_size, tp innermost."""

    dp_size: int = 1
    sp_size: int = 1
    tp_size: int = 1

    def __post_init__(self) -> None:
        _require_positive(self, "dp_size", "sp_size", "tp_size")

    @property
    def world_size(self) -> int:
        return self.dp_size * self.sp_size * self.tp_size

    def check_model(self, model: ModelConfig) -> None:
        """Raises ValueError when `model` cannot be cut into tp_size shards.

        sp_size needs no such rule: sequences, heads and batches may split unevenly over the sp axis.
        """
        heads = (model.num_attention_heads, model.num_query_groups)
        if any(count % self.tp_size for count in heads) or model.ffn_hidden_size % self.tp_size:
            fits = divisors(*heads, model.ffn_hidden_size)
            raise ValueError(
                f"tp_size={self.tp_size} does not divide num_attention_heads={heads[0]}, "
                f"num_query_groups={heads[1]} and ffn_hidden_size={model.ffn_hidden_size}; "
                f"use --tp {' or '.join(map(str, fits))} and spread the rest over --sp"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionConfig:
    """How a prompt attends across sp ranks (method.md sections 3 and 4)."""

    # Of requests that do not say. exact: to all tokens; csa: to those that its setting keeps; auto: exact
    # below csa_min_tokens, csa from there on.
    mode: AttentionMode = "exact"
    # None: where CSA's cost model expects it to pay.
    csa_min_tokens: int | None = None
    # Of exact attention. auto: pass_q onto a cached context, ulysses where KV heads divide by sp_size, else
    # pass_kv.
    strategy: PrefillStrategy = "auto"
    # True: head chunk c+1 travels while chunk c attends. False: same result, one chunk at a time.
    pipeline: bool = True
    # What computes a rank's share. auto: triton on CUDA devices where it is installed, else torch.
    kernels: KernelChoice = "auto"

    def __post_init__(self) -> None:
        _require_choice("mode", self.mode, ATTENTION_MODES)
        if self.csa_min_tokens is not None:
            _require_positive(self, "csa_min_tokens")
        _require_choice("strategy", self.strategy, PREFILL_STRATEGIES)
        _require_choice("kernels", self.kernels, KERNEL_CHOICES)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheConfig:
    """Size of the paged KV cache on every sp rank; total capacity is sp_size times this."""

    num_blocks: int
    block_size: int = 64  # tokens per block

    def __post_init__(self) -> None:
        _require_positive(self, "num_blocks", "block_size")

    @property
    def tokens_per_rank(self) -> int:
        return self.num_blocks * self.block_size


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """What runs when: the policy, its numbers, and what becomes of requests that must make room."""

    policy: PolicyName = "sps2"
    # Requests that are prefilling or running, at most.
    max_num_seqs: int = 1
    # sarathi: tokens of a step, the chunk size. fcfs: prompt tokens of a step, or one longer prompt.
    # sps2: tokens of a batch of short prompts, on each rank.
    max_num_batched_tokens: int = 2048
    # sps2: prompts of at most so many tokens live wholly on one sp rank; 0: every prompt is spread.
    short_prompt_tokens: int = 0
    # sps2: milliseconds between two tokens of a running request to aim for; None: as short as can be.
    tbt_slo_ms: float | None = None
    # sps2: layers of a prefill between two of which others may run; None: by the time they take.
    layers_per_piece: int | None = None
    # sps2: tokens of all spread prompts between their first and last layer; None: as many as have KV blocks.
    # One may always begin, and so may short ones.
    max_started_tokens: int | None = None
    # Share of the blocks of a shard that a new request leaves free while others run, for their next tokens.
    watermark: float = 0.01
    preemption: PreemptionMode = "recompute"
    # Full blocks of exact prompts can be found by later prompts that begin alike.
    prefix_caching: bool = False

    def __post_init__(self) -> None:
        _require_choice("policy", self.policy, POLICY_NAMES)
        _require_choice("preemption", self.preemption, PREEMPTION_MODES)
        _require_positive(self, "max_num_seqs", "max_num_batched_tokens")
        for name in ("layers_per_piece", "max_started_tokens"):
            if getattr(self, name) is not None:
                _require_positive(self, name)
        if self.short_prompt_tokens < 0:
            raise ValueError(f"short_prompt_tokens={self.short_prompt_tokens} must be 0 (none) or above")
        if self.tbt_slo_ms is not None and not 0 < self.tbt_slo_ms < math.inf:
            raise ValueError(f"tbt_slo_ms={self.tbt_slo_ms} must be a number of milliseconds above 0")
        if self.policy == "sarathi" and self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} is below max_num_seqs="
                f"{self.max_num_seqs}; with policy 'sarathi' every running request decodes in every step, "
                "raise the one or lower the other"
            )
        if not 0 <= self.watermark < 1:
            raise ValueError(f"watermark={self.watermark} must be at least 0 and below 1")


class KVCacheFull(RuntimeError):
    """No KV block is left where one is needed; nothing was allocated or written."""


def _is_logprobs(count: int | None) -> bool:
    return count is None or 0 <= count <= MAX_LOGPROBS


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one request turns logits into tokens; names and defaults are vLLM's and OpenAI's."""

    max_tokens: int = 64
    min_tokens: int = 0
    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    # None: no logprobs; k: the chosen token's, and the k likeliest beside it.
    logprobs: int | None = None
    # None: nothing of the prompt's tokens; k: the log-probability of each, and the k likeliest in its place.
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        _require_positive(self, "max_tokens")
        checks = {
            "min_tokens": (0 <= self.min_tokens <= self.max_tokens, f"between 0 and {self.max_tokens}"),
            "temperature": (0 <= self.temperature < math.inf, "0 (greedy) or above, and finite"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or above"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0 and finite; 1 is off"),
            "logprobs": (_is_logprobs(self.logprobs), f"between 0 and {MAX_LOGPROBS}"),
            "prompt_logprobs": (_is_logprobs(self.prompt_logprobs), f"between 0 and {MAX_LOGPROBS}"),
        }
        for name, (holds, rule) in checks.items():
            if not holds:
                raise ValueError(f"{name}={getattr(self, name)} must be {rule}")
        if any(not text for text in self.stop):
            raise ValueError(
                "stop contains an empty string; an empty stop string would end every answer at once"
            )
