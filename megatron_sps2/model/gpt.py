"""A GPT forward in steps: embed, one layer at a time, logits. A prefill may pause between any two of them.

Knows the model and the tp axis; that the sequence is spread over ranks is known to the core attention only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import megatron_sps2.model.eager  # noqa: F401  # isort: skip  # before anything of Megatron

import torch
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn

from megatron_sps2.config import ModelConfig
from megatron_sps2.model.linear import linear, pack, pack_linears
from megatron_sps2.model.rotary import inverse_frequencies, turned_by
from megatron_sps2.ops.rotation import Rotation
from megatron_sps2.parallel.collectives import Wire, gather_vocab
from megatron_sps2.parallel.groups import axis_of
from megatron_sps2.parallel.ledger import Ledger


class GptForward:
    """Runs a Megatron GPTModel layer by layer on the tokens this rank holds. s may be 0 in every method.

    Takes the model over once its weights are loaded: on CPU they are repacked in place for speed.
    """

    def __init__(self, gpt: GPTModel, model: ModelConfig) -> None:
        self.gpt = gpt
        self.model = model
        self.weight_bytes = sum(weight.nbytes for weight in gpt.parameters())
        self._tp = Wire(axis_of(gpt.pg_collection.tp), Ledger())
        tied = gpt.share_embeddings_and_output_weights
        plain = gpt.shared_embedding_or_output_weight() if tied else gpt.output_layer.weight
        # Tied: a second, packed copy, as the lookup needs the plain one. It makes logits 2.5 times faster.
        self._output_weight = pack(plain)
        if not tied:
            gpt.output_layer.weight = None
        pack_linears(gpt)
        self._frequencies = [each.to(plain.device) for each in _frequencies(model)]

    def book_traffic(self, ledger: Ledger) -> None:
        """From now on `ledger` counts what the tp axis sends: Megatron's own all-reduces, and the logits."""
        self._tp = Wire(self._tp.axis, ledger)
        if self._tp.axis.size > 1:
            self.gpt.embedding.word_embeddings.register_forward_hook(self._book("tp_embedding"))
            for layer in self.gpt.decoder.layers:
                # A mixture adds up its experts before it reduces.
                for reducing in (
                    layer.self_attention.linear_proj,
                    getattr(layer.mlp, "linear_fc2", layer.mlp),
                ):
                    reducing.register_forward_hook(self._book("tp_all_reduce"))

    def _book(self, name: str) -> Callable[..., None]:
        """A hook that books a module's all-reduced output as a ring sends it: 2 (T-1)/T of its bytes."""

        def book(_: nn.Module, __: Any, output: Any) -> None:
            reduced = output[0] if isinstance(output, tuple) else output
            size = self._tp.axis.size
            self._tp.ledger.add(name, round(2 * reduced.nbytes * (size - 1) / size))

        return book

    @property
    def num_layers(self) -> int:
        return self.model.num_layers

    def angles(self, positions: Tensor) -> Tensor:
        """[s] places in the whole sequence -> angles of all layers; `angles_of` gives those of one."""
        if self.model.learned_positions:
            return torch.empty(len(positions), 0, device=positions.device)
        # Beside them, where they differ, those of the windowed layers.
        return torch.cat([turned_by(positions, each) for each in self._frequencies], dim=-1)

    @torch.inference_mode()
    def embed(self, token_ids: Tensor, positions: Tensor) -> Tensor:
        """[s, b] token ids at [s] places in the whole sequence -> [s, b, h]."""
        hidden = self.gpt.embedding.word_embeddings(token_ids)
        if self.model.is_gemma:  # whose factor is rounded to the dtype
            hidden = hidden * torch.tensor(self.model.hidden_size**0.5, dtype=hidden.dtype)
        if self.model.learned_positions:
            hidden = hidden + self.gpt.embedding.position_embeddings(positions)[:, None]
        return hidden

    def angles_of(self, index: int, angles: Tensor) -> Tensor | None:
        """What `layer` takes for layer `index`, of `angles`; None where it turns nothing."""
        kind = self._kind(index)
        return None if kind is None else angles.chunk(len(self._frequencies), dim=-1)[kind]

    def rotations(self, angles: Tensor, dtype: torch.dtype) -> Callable[[int], Rotation | None]:
        """As angles_of, ready for queries and keys of `dtype`; made once for all layers."""
        made = [Rotation.of(each, dtype) for each in angles.chunk(max(1, len(self._frequencies)), dim=-1)]

        def of(index: int) -> Rotation | None:
            kind = self._kind(index)
            return None if kind is None else made[kind]

        return of

    def _kind(self, index: int) -> int | None:
        """Which frequencies turn a layer's queries and keys."""
        if self.model.learned_positions or index in self.model.no_rope_layers:
            return None
        return int(len(self._frequencies) > 1 and index in self.model.window_layers)

    @torch.inference_mode()
    def layer(self, index: int, hidden: Tensor, angles: Tensor | None) -> Tensor:
        """[s, b, h] -> [s, b, h] through layer `index`, from 0. Its core attention may talk to others.

        With angles None, queries and keys come to the core attention as they are.
        """
        layer = self.gpt.decoder.layers[index]
        if hidden.shape[0] == 0:
            _attend_nothing(layer.self_attention, hidden)
            return hidden
        hidden, _ = layer(hidden, attention_mask=None, rotary_pos_emb=angles)
        return hidden

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """[s, b, h] after the last layer -> [s, b, v] fp32, gathered over the tp axis, padding cut off."""
        normed = self.gpt.decoder.final_layernorm(hidden)
        shard = linear(normed, self._output_weight)  # [s, b, v_padded/T]
        whole = gather_vocab(shard, self._tp)
        return whole[..., : self.model.vocab_size].float()


def _frequencies(model: ModelConfig) -> list[Tensor]:
    """Of all layers alike, or of the full and of the windowed ones."""
    if model.learned_positions:
        return []
    full = inverse_frequencies(model.head_dim, model.rotary_base, model.rope_scaling)
    if model.window_rotary_base is None:
        return [full]
    return [full, inverse_frequencies(model.head_dim, model.window_rotary_base)]


def _attend_nothing(attention: SelfAttention, hidden: Tensor) -> None:
    """hidden [0, b, h]: enter the core attention alone, where other ranks' collectives wait for this rank.

    Megatron's own forward cannot: it reshapes with -1, which no size decides when there are no elements.
    """
    num_heads = attention.num_attention_heads_per_partition
    num_groups = attention.num_query_groups_per_partition
    shape = (0, hidden.shape[1], num_heads + 2 * num_groups, attention.hidden_size_per_attention_head)
    q, k, v = hidden.new_empty(shape).split((num_heads, num_groups, num_groups), dim=2)
    attention.core_attention(
        q, k, v, None, attn_mask_type=attention.attn_mask_type, attention_bias=None, packed_seq_params=None
    )
