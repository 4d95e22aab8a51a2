"""A GPT forward in steps: embed, one layer at a time, logits. A prefill may pause between any two of them.

Knows the model and the tp axis; that the sequence is spread over ranks is known to the core attention only.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor

from megatron_sps2.config import ModelConfig
from megatron_sps2.model.linear import linear, pack, pack_linears
from megatron_sps2.model.rotary import rotary_angles


class GptForward:
    """Runs a Megatron GPTModel layer by layer on the tokens this rank holds. s may be 0 in every method.

    Takes the model over once its weights are loaded: on CPU they are repacked in place for speed.
    """

    def __init__(self, gpt: GPTModel, model: ModelConfig) -> None:
        self.gpt = gpt
        self.model = model
        tied = gpt.share_embeddings_and_output_weights
        plain = gpt.shared_embedding_or_output_weight() if tied else gpt.output_layer.weight
        # Tied: a second, packed copy, as the lookup needs the plain one. It makes logits 2.5 times faster.
        self._output_weight = pack(plain)
        if not tied:
            gpt.output_layer.weight = None
        pack_linears(gpt)

    @property
    def num_layers(self) -> int:
        return self.model.num_layers

    def angles(self, positions: Tensor) -> Tensor:
        """[s] places in the whole sequence -> what `layer` takes as angles, once for all layers."""
        return rotary_angles(positions, self.model.head_dim, self.model.rotary_base)

    @torch.inference_mode()
    def embed(self, token_ids: Tensor) -> Tensor:
        """[s, b] token ids -> [s, b, h]."""
        return self.gpt.embedding.word_embeddings(token_ids)

    @torch.inference_mode()
    def layer(self, index: int, hidden: Tensor, angles: Tensor) -> Tensor:
        """[s, b, h] -> [s, b, h] through layer `index`, from 0. Its core attention may talk to others."""
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
        whole = _gather_vocab(shard, self.gpt.pg_collection.tp)
        return whole[..., : self.model.vocab_size].float()


def _gather_vocab(shard: Tensor, tp_group: dist.ProcessGroup) -> Tensor:
    """[..., v/T] -> [..., v] on every tp rank. Megatron's own gather allocates on CUDA, always."""
    if tp_group.size() == 1:
        return shard
    shards = [torch.empty_like(shard) for _ in range(tp_group.size())]
    dist.all_gather(shards, shard.contiguous(), group=tp_group)
    return torch.cat(shards, dim=-1)


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
