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
from megatron_sps2.attention.prefill import PrefillShape, kv_chunks, pass_q

__all__ = ["CsaRun", "csa"]


def csa(q: Tensor, k: Tensor, v: Tensor, run: CsaRun, layer: int) -> Tensor:
    """q [s/P, 1, n, d], k and v [s/P, 1, n_kv, d] on whole segments -> [s/P, 1, n, d]."""
    assert q.shape[1] == 1, "CSA takes one prompt at a time"
    sent = run.wire.ledger.total_sent
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    # Made as they come and dropped once attended: two are alive at a time.
    chunks = (HeadChunk.cut(run, layer, heads, q, k, v) for heads in kv_chunks(k.shape[2], run.overlap))
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
    """Fills a chunk's heads of out [s/P, 1, n, d], segment by segment; pauses between them."""
    chunk = kept.chunk
    plan, spans = chunk.run.plan, chunk.run.spans
    for segment in plan.held[chunk.run.rank]:
        start = chunk.offset(segment)
        rows = slice(start, start + plan.num_rows(segment))
        if rows.stop == rows.start:
            continue
        place = out[rows, 0, chunk.queries]
        with spans("local"):
            own, own_lse = _attend_own(chunk, rows)
        with spans("far"):
            _attend_far(kept, segment, rows, own, own_lse, place)
        yield


def _attend_own(chunk: HeadChunk, rows: slice) -> tuple[Tensor, Tensor]:
    """Causal, inside the segment: out [s, n, d], lse [s, n]."""
    k, v = (x[:, rows].transpose(0, 1).unsqueeze(1) for x in (chunk.k, chunk.v))
    out, lse = chunk.run.kernels.attend(chunk.q[rows].unsqueeze(1), k, v, scale=chunk.run.scale, diagonal=0)
    return out[:, 0], lse[:, 0]


def _attend_far(
    kept: KeptKeys, segment: int, rows: slice, own: Tensor, own_lse: Tensor, place: Tensor
) -> None:
    """Own (out, lse) merged with attention to the kept keys, which are all in the past, into `place`."""
    chunk, attend = kept.chunk, kept.chunk.run.kernels.attend
    for head in range(len(chunk.heads)):
        queries = slice(head * chunk.group, (head + 1) * chunk.group)
        found = kept.of(segment, head)
        if found is None:
            place[:, queries] = own[:, queries]
            continue
        k, v = (x[:, None, None] for x in found)
        far, far_lse = attend(chunk.q[rows, None, queries], k, v, scale=chunk.run.scale, diagonal=None)
        # Two parts, of which the own is never empty: out = own + w (far - own), as ops.merge gives it.
        weight = torch.sigmoid(far_lse[:, 0] - own_lse[:, queries]).unsqueeze(-1)
        place[:, queries] = own[:, queries].float().lerp_(far[:, 0].float(), weight)


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
