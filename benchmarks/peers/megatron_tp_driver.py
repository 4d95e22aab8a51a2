"""Megatron-core's own forward, tp ranks of one thread: its local layer spec, DotProductAttention as it is.

It has no KV cache on CPU here, so no decode; and it holds the scores of all tokens against all.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from typing import Any

import psutil
import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from benchmarks.peers.protocol import Answer, Driver, serve
from benchmarks.peers.ranks import become_rank_0, hear, tell
from megatron_sps2.config import ParallelConfig
from megatron_sps2.model.checkpoint import load_weights
from megatron_sps2.model.manifest import load_model_config
from megatron_sps2.model.rotary import rotary_angles
from megatron_sps2.model.spec import transformer_config
from megatron_sps2.parallel.groups import ParallelGroups

# Of each score at the peak: bf16 buffer, fp32 copy, fp32 probabilities, bf16 probabilities.
BYTES_PER_SCORE = 2 + 4 + 4 + 2


class MegatronTp(Driver):
    """This rank's shard of the model."""

    def __init__(self, checkpoint: str, tp_size: int) -> None:
        _without_cuda()
        groups = ParallelGroups.create(ParallelConfig(tp_size=tp_size)).to_megatron()
        self._config = load_model_config(checkpoint)
        self._gpt = GPTModel(
            config=transformer_config(self._config, tp_size, torch.bfloat16),
            transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
            vocab_size=self._config.vocab_size,
            max_sequence_length=self._config.max_seq_len,
            parallel_output=True,
            share_embeddings_and_output_weights=self._config.tie_embeddings,
            position_embedding_type="none",  # the angles are given to the layers
            pg_collection=groups,
        )
        self._gpt.to(torch.bfloat16).requires_grad_(False).eval()
        load_weights(self._gpt, checkpoint, groups)

    def prefill(self, ids: list[int]) -> Answer:
        self._check_memory(len(ids))
        tell(ids)
        start = time.perf_counter()
        token = self.forward(ids)
        return time.perf_counter() - start, [token]

    @torch.no_grad()
    def forward(self, ids: list[int]) -> int:
        """All ranks: the likeliest next token. Only the last row meets the output layer, as in the peers."""
        angles = rotary_angles(torch.arange(len(ids)), self._config.head_dim, self._config.rotary_base)
        hidden = self._gpt.embedding(torch.tensor([ids]), None)
        mask = torch.ones(1, 1, len(ids), len(ids), dtype=torch.bool).triu_(1)
        hidden = self._gpt.decoder(hidden, attention_mask=mask, rotary_pos_emb=angles)
        shard, _ = self._gpt.output_layer(hidden[-1:])
        return self._likeliest(shard[0, 0].float())

    def _likeliest(self, shard: Tensor) -> int:
        shards = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
        dist.all_gather(shards, shard)
        return int(torch.cat(shards).argmax())

    def _check_memory(self, num_tokens: int) -> None:
        """Refuses what would be killed in the middle, and others with it."""
        needed = self._config.num_attention_heads * num_tokens**2 * BYTES_PER_SCORE / 2**30
        if needed > (free := psutil.virtual_memory().available / 2**30):
            raise MemoryError(
                f"scores of {num_tokens} tokens take {needed:.0f} GiB on all ranks, {free:.0f} are free"
            )


def _without_cuda() -> None:
    """What DotProductAttention takes from CUDA even on CPU: its score buffer and its dropout's generator."""

    class Buffer:
        def get_tensor(self, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> Tensor:
            return torch.empty(shape, dtype=dtype)

    class Generator:
        def fork(self) -> contextlib.AbstractContextManager[None]:
            return contextlib.nullcontext()

    parallel_state._GLOBAL_MEMORY_BUFFER = Buffer()
    tensor_parallel.get_cuda_rng_tracker = Generator


def follow(checkpoint: str, tp_size: int) -> None:
    driver = MegatronTp(checkpoint, tp_size)
    while True:
        driver.forward(hear())


def build(args: argparse.Namespace) -> tuple[Driver, str]:
    place: tuple[Any, ...] = (args.model, args.threads)
    become_rank_0(args.threads, follow, *place)
    import megatron.core

    return MegatronTp(*place), f"megatron-core {megatron.core.__version__}, tp {args.threads}"


if __name__ == "__main__":
    serve(build, __doc__)
