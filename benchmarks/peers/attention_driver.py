"""One exact attention layer of the model's shape, its sequence spread over sp ranks of one thread.

--setting says whose: ulysses or pass_kv (ours), deepspeed, yunchang_ulysses, yunchang_ring. Theirs attend
inside by torch's flash kernel. Checked on a short prompt against torch's whole attention before it is timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.peers.protocol import Answer, Driver, serve
from benchmarks.peers.ranks import become_rank_0, hear, tell

HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64
CHECK_TOKENS = 512
# bf16 outputs of size about 1, which each kernel rounds once or twice.
TOLERANCE = 0.04

# q, k, v [s/P, 1, n, d] of a contiguous shard -> [s/P, 1, n, d]
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(strategy: str) -> Callable[[int], Layer]:
    from megatron_sps2.attention.prefill import STRATEGIES, PrefillShape
    from megatron_sps2.config import ParallelConfig
    from megatron_sps2.parallel.collectives import Wire
    from megatron_sps2.parallel.groups import ParallelGroups
    from megatron_sps2.parallel.layout import contiguous, zigzag
    from megatron_sps2.parallel.ledger import Ledger

    axis = ParallelGroups.create(ParallelConfig(sp_size=dist.get_world_size())).sp

    def for_tokens(num_tokens: int) -> Layer:
        lay_out = contiguous if strategy == "ulysses" else zigzag
        layout = lay_out(num_tokens, axis.size)
        shape = PrefillShape(layout=layout, wire=Wire(axis, Ledger()), scale=HEAD_DIM**-0.5, overlap=True)
        return lambda q, k, v: STRATEGIES[strategy](q, k, v, shape)

    return for_tokens


def deepspeed(_: str) -> Callable[[int], Layer]:
    import deepspeed
    from deepspeed.sequence.layer import DistributedAttention

    deepspeed.init_distributed("gloo")

    def flash(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        out, _lse = _flash_on_cpu(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1))
        return out.transpose(0, 1).contiguous()

    layer = DistributedAttention(flash, dist.group.WORLD, scatter_idx=2, gather_idx=0)
    return lambda num_tokens: lambda q, k, v: layer(q, k, v, 1)


def yunchang(setting: str) -> Callable[[int], Layer]:
    from yunchang import LongContextAttention, set_seq_parallel_pg

    size = dist.get_world_size()
    degrees = (size, 1) if setting == "yunchang_ulysses" else (1, size)
    set_seq_parallel_pg(*degrees, dist.get_rank(), size)
    # Its own kernels need CUDA. It takes another one by this door, and in the plain ring only, not zigzag.
    layer = LongContextAttention(ring_impl_type="basic", attn_type=None, attn_processor=_flash_on_cpu)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = layer(*(x.transpose(0, 1) for x in (q, k, v)), causal=True)
        return out.transpose(0, 1)

    return lambda num_tokens: run


def _flash_on_cpu(
    q: Tensor, k: Tensor, v: Tensor, causal: bool = True, softmax_scale: float | None = None, **_: Any
) -> tuple[Tensor, Tensor]:
    """q [b, s, n, d], k and v [b, s, n_kv, d] -> the like of q, and the lse [b, n, s]."""
    per_kv = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(per_kv, dim=2) for x in (k, v))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *(x.transpose(1, 2) for x in (q, k, v)), 0.0, causal, scale=softmax_scale
    )
    return out.transpose(1, 2), lse


LAYERS = {
    "ulysses": ours,
    "pass_kv": ours,
    "deepspeed": deepspeed,
    "yunchang_ulysses": yunchang,
    "yunchang_ring": yunchang,
}


class AttentionLayer(Driver):
    """Rank 0 tells the others how long the next prompt is; all run it."""

    def __init__(self, setting: str) -> None:
        self._for_tokens, self._is_zigzag = LAYERS[setting](setting), setting == "pass_kv"

    def attention(self, num_tokens: int) -> Answer:
        tell(num_tokens)
        return self.run(num_tokens)[0], []

    @torch.no_grad()
    def run(self, num_tokens: int) -> tuple[float, float]:
        """All ranks -> seconds of the slowest, and the largest error where the prompt is short."""
        whole = _whole(num_tokens)
        mine, layer = self._positions(num_tokens), self._for_tokens(num_tokens)
        shards = [x[mine] for x in whole]
        dist.barrier()
        start = time.perf_counter()
        out = layer(*shards)
        seconds = time.perf_counter() - start
        error = 0.0
        if num_tokens <= CHECK_TOKENS:
            q, k, v = (x.permute(1, 2, 0, 3) for x in whole)
            right = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            error = float((right.permute(2, 0, 1, 3)[mine] - out).abs().max())
        both = torch.tensor([seconds, error])
        dist.all_reduce(both, dist.ReduceOp.MAX)
        return float(both[0]), float(both[1])

    def check(self) -> None:
        error = self.run(CHECK_TOKENS)[1]
        if not error < TOLERANCE:
            raise RuntimeError(f"attention over {CHECK_TOKENS} tokens is wrong by {error:.3f}")

    def _positions(self, num_tokens: int) -> Tensor:
        """[s/P] of this rank. Zigzag: an early piece and a late one."""
        rank, size = dist.get_rank(), dist.get_world_size()
        pieces = torch.arange(num_tokens).chunk(2 * size if self._is_zigzag else size)
        return torch.cat((pieces[rank], pieces[-1 - rank])) if self._is_zigzag else pieces[rank]


def _whole(num_tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    return [
        torch.randn(num_tokens, 1, heads, HEAD_DIM, generator=generator).bfloat16()
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]


def follow(setting: str) -> None:
    layer = AttentionLayer(setting)
    layer.check()
    while True:
        layer.run(hear())


def build(args: argparse.Namespace) -> tuple[Driver, str]:
    become_rank_0(args.threads, follow, args.setting)
    layer = AttentionLayer(args.setting)
    layer.check()
    return layer, f"{args.setting}, sp {args.threads}"


if __name__ == "__main__":
    serve(build, __doc__)
