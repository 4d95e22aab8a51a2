"""CSA: every segment attends to itself and to the keys it keeps of earlier segments (method.md section 4).

Probes of a segment score keys where they lie; only kept keys travel, once to each rank that reads them.
A head chunk is selected and fetched between the parts of the attention of the one before. Knows no models.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from megatron_sps2.attention.csa_exchange import KeptKeys
from megatron_sps2.attention.csa_run import CsaRun, HeadChunk
from megatron_sps2.attention.prefill import PrefillShape, in_chunks, kv_chunks, pass_q

# Messages of the next head chunk that should be on their way while this one attends.
STAGES = 4

__all__ = ["CsaRun", "csa"]


def csa(q: Tensor, k: Tensor, v: Tensor, run: CsaRun, layer: int) -> Tensor:
    """q [s/P, 1, n, d], k and v [s/P, 1, n_kv, d] on whole segments -> [s/P, 1, n, d]."""
    assert q.shape[1] == 1, "CSA takes one prompt at a time"
    sent = run.wire.ledger.total_sent
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    heads_of_chunks = kv_chunks(k.shape[2], in_chunks(k, run.wire, run.overlap))
    # Made as they come and dropped once attended: two are alive at a time.
    chunks = (HeadChunk.cut(run, layer, heads, q, k, v) for heads in heads_of_chunks)
    kept = KeptKeys(next(chunks))
    _finish(kept.fetch())
    for chunk in chunks:
        following = KeptKeys(chunk)
        ahead = following.fetch()
        next(ahead, None)
        for _ in _attend(kept, out):
            next(ahead, None)
        _finish(ahead)
        kept = following
    _finish(_attend(kept, out))
    if run.plan.setting.tail:
        with run.spans("tail"):
            _attend_tail(q, k, v, out, run)
    run.tally.bytes_sent += run.wire.ledger.total_sent - sent
    return out


def _finish(stages: Iterator[None]) -> None:
    for _ in stages:
        pass


def _attend(kept: KeptKeys, out: Tensor) -> Iterator[None]:
    """Fills a chunk's heads of out [s/P, 1, n, d]; pauses now and then."""
    chunk, run = kept.chunk, kept.chunk.run
    yield from run.kernels.attend_kept(
        *(chunk.q, kept.k, kept.v, kept.bits),
        run.routes.attending,
        out[:, 0, chunk.queries],
        scale=run.scale,
        num_pauses=1 if len(run.ranks) == 1 else STAGES,
        timed=run.spans,
    )


def _attend_tail(q: Tensor, k: Tensor, v: Tensor, out: Tensor, run: CsaRun) -> None:
    """The last queries of the prompt go to all keys, as decode does; overwrites their rows of `out`."""
    layout = run.plan.tail_layout()
    before = len(q) - layout.tokens_per_rank[run.rank]
    shape = PrefillShape(
        layout=layout,
        wire=run.wire,
        scale=run.scale,
        overlap=False,
        past=(k[:before], v[:before]),
        kernels=run.kernels,
    )
    out[before:] = pass_q(q[before:], k[before:], v[before:], shape)
