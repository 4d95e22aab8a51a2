"""Weight rules between Hugging Face names of Llama and its relatives and Megatron names, both directions.

Pure functions on whole (unsharded) tensors. Knows names and layouts; no file, no rank.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sps2.config import ModelConfig

Fetch = Callable[[str], Tensor]

EMBEDDING = "embedding.word_embeddings.weight"
POSITIONS = "embedding.position_embeddings.weight"
OUTPUT = "output_layer.weight"
# What gate, up and down are called, in Mixtral and in all others.
MIXTRAL = ("w1", "w3", "w2")
LLAMA = ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, slots=True)
class WeightRule:
    """One Megatron weight of a shape, and the Hugging Face weights it is made of, with theirs."""

    megatron: str
    shape: tuple[int, ...]
    hf: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    join: Callable[..., Tensor]
    split: Callable[[Tensor], tuple[Tensor, ...]]


def join_qkv(model: ModelConfig, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [n*d, h], k and v [n_kv*d, h] -> [n_kv * (n/n_kv + 2) * d, h]: per KV head its queries, k and v.

    Biases, without the h, are laid out alike.
    """
    groups, width = model.num_query_groups, q.shape[1:]
    parts = [x.view(groups, -1, model.head_dim, *width) for x in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(-1, *width)


def split_qkv(model: ModelConfig, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of join_qkv."""
    width = qkv.shape[1:]
    grouped = qkv.view(model.num_query_groups, model.queries_per_group + 2, model.head_dim, *width)
    q, k, v = (x.reshape(-1, *width) for x in grouped.split((model.queries_per_group, 1, 1), dim=1))
    return q, k, v


def join_gate_up(gate: Tensor, up: Tensor) -> Tensor:
    """Two [ffn, h] -> [2*ffn, h], gate first."""
    return torch.cat((gate, up))


def split_gate_up(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of join_gate_up."""
    gate, up = gate_up.chunk(2)
    return gate, up


def weight_rules(model: ModelConfig) -> Iterator[WeightRule]:
    """Every weight of `model`, in the order of the layers."""
    if model.learned_positions:
        yield from _gpt2_rules(model)
        return
    hidden, vocab = model.hidden_size, model.vocab_size
    yield _same(EMBEDDING, "model.embed_tokens.weight", (vocab, hidden))
    for index in range(model.num_layers):
        yield from _layer_rules(model, f"decoder.layers.{index}", f"model.layers.{index}")
    yield _same("decoder.final_layernorm.weight", "model.norm.weight", (hidden,))
    if not model.tie_embeddings:
        yield _same(OUTPUT, "lm_head.weight", (vocab, hidden))


def _layer_rules(model: ModelConfig, ours: str, hf: str) -> Iterator[WeightRule]:
    hidden = model.hidden_size
    q_size, kv_size = model.num_attention_heads * model.head_dim, model.num_query_groups * model.head_dim
    yield _same(f"{ours}.input_layernorm.weight", f"{hf}.input_layernorm.weight", (hidden,))
    parts: dict[str, tuple[int, ...]] = {"weight": (hidden,), **({"bias": ()} if model.qkv_bias else {})}
    for kind, width in parts.items():
        yield WeightRule(
            f"{ours}.self_attention.linear_qkv.{kind}",
            (q_size + 2 * kv_size, *width),
            tuple(f"{hf}.self_attn.{name}_proj.{kind}" for name in "qkv"),
            ((q_size, *width), (kv_size, *width), (kv_size, *width)),
            functools.partial(join_qkv, model),
            functools.partial(split_qkv, model),
        )
    for name in "qk" if model.qk_norm else "":
        yield _same(
            f"{ours}.self_attention.{name}_layernorm.weight",
            f"{hf}.self_attn.{name}_norm.weight",
            (model.head_dim,),
        )
    yield _same(
        f"{ours}.self_attention.linear_proj.weight", f"{hf}.self_attn.o_proj.weight", (hidden, q_size)
    )
    before_mlp = "post_attention_layernorm"
    if model.is_gemma:
        before_mlp = "pre_feedforward_layernorm"
        for end, theirs in {
            "self_attention.linear_proj": "post_attention_layernorm",
            "mlp.linear_fc2": "post_feedforward_layernorm",
        }.items():
            yield _same(f"{ours}.{end}.post_layernorm.weight", f"{hf}.{theirs}.weight", (hidden,))
    yield _same(f"{ours}.pre_mlp_layernorm.weight", f"{hf}.{before_mlp}.weight", (hidden,))
    if not model.num_experts:
        yield from _mlp_rules(model, f"{ours}.mlp", f"{hf}.mlp", LLAMA)
        return
    block, names = ("mlp", LLAMA) if model.qk_norm else ("block_sparse_moe", MIXTRAL)
    yield _same(f"{ours}.mlp.router.weight", f"{hf}.{block}.gate.weight", (model.num_experts, hidden))
    for index in range(model.num_experts):
        expert = f"{ours}.mlp.experts.local_experts.{index}"
        yield from _mlp_rules(model, expert, f"{hf}.{block}.experts.{index}", names)


def _mlp_rules(model: ModelConfig, ours: str, hf: str, names: tuple[str, str, str]) -> Iterator[WeightRule]:
    """A gated MLP, whose gate, up and down are called `names`."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    gate, up, down = (f"{hf}.{name}.weight" for name in names)
    yield WeightRule(
        f"{ours}.linear_fc1.weight",
        (2 * ffn, hidden),
        (gate, up),
        ((ffn, hidden), (ffn, hidden)),
        join_gate_up,
        split_gate_up,
    )
    yield _same(f"{ours}.linear_fc2.weight", down, (hidden, ffn))


def _gpt2_rules(model: ModelConfig) -> Iterator[WeightRule]:
    """GPT-2 stores its linears' weights as [in, out]."""
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    yield _same(EMBEDDING, "transformer.wte.weight", (model.vocab_size, hidden))
    yield _same(POSITIONS, "transformer.wpe.weight", (model.max_seq_len, hidden))
    for index in range(model.num_layers):
        ours, hf = f"decoder.layers.{index}", f"transformer.h.{index}"
        linears = {
            "attn.c_proj": ("self_attention.linear_proj", hidden, hidden),
            "mlp.c_fc": ("mlp.linear_fc1", hidden, ffn),
            "mlp.c_proj": ("mlp.linear_fc2", ffn, hidden),
        }
        for theirs, norm in {"ln_1": "input_layernorm", "ln_2": "pre_mlp_layernorm"}.items():
            for kind in ("weight", "bias"):
                yield _same(f"{ours}.{norm}.{kind}", f"{hf}.{theirs}.{kind}", (hidden,))
        for kind, shape in {"weight": (hidden, 3 * hidden), "bias": (3 * hidden,)}.items():
            yield WeightRule(
                f"{ours}.self_attention.linear_qkv.{kind}",
                tuple(reversed(shape)),
                (f"{hf}.attn.c_attn.{kind}",),
                (shape,),
                lambda qkv: join_qkv(model, *_turn(qkv).chunk(3)),
                lambda qkv: (_turn(torch.cat(split_qkv(model, qkv))),),
            )
        for theirs, (name, num_in, num_out) in linears.items():
            yield _turned(f"{ours}.{name}.weight", f"{hf}.{theirs}.weight", (num_in, num_out))
            yield _same(f"{ours}.{name}.bias", f"{hf}.{theirs}.bias", (num_out,))
    for kind in ("weight", "bias"):
        yield _same(f"decoder.final_layernorm.{kind}", f"transformer.ln_f.{kind}", (hidden,))
    if not model.tie_embeddings:
        yield _same(OUTPUT, "lm_head.weight", (model.vocab_size, hidden))


def _turned(megatron: str, hf: str, shape: tuple[int, int]) -> WeightRule:
    return WeightRule(megatron, shape[::-1], (hf,), (shape,), _turn, lambda x: (_turn(x),))


def _turn(weight: Tensor) -> Tensor:
    """[in, out] <-> [out, in]; a bias stays as it is."""
    return weight.T if weight.dim() == 2 else weight


def _same(megatron: str, hf: str, shape: tuple[int, ...]) -> WeightRule:
    return WeightRule(megatron, shape, (hf,), (shape,), lambda x: x, lambda x: (x,))


def hf_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every Hugging Face weight that makes up `model`."""
    return {
        name: shape
        for rule in weight_rules(model)
        for name, shape in zip(rule.hf, rule.hf_shapes, strict=True)
    }


def to_megatron(model: ModelConfig, fetch: Fetch, only: str | None = None) -> Iterator[tuple[str, Tensor]]:
    """(Megatron name, tensor) one by one, or one alone; `fetch` gives a Hugging Face weight by name."""
    for rule in weight_rules(model):
        if only not in (None, rule.megatron):
            continue
        yield rule.megatron, rule.join(*(fetch(name) for name in rule.hf))


def to_hf(model: ModelConfig, fetch: Fetch) -> Iterator[tuple[str, Tensor]]:
    """(Hugging Face name, tensor) one by one; `fetch` gives a whole Megatron weight by name."""
    for rule in weight_rules(model):
        yield from zip(rule.hf, rule.split(fetch(rule.megatron)), strict=True)
