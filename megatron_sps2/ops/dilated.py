"""The paper's own sparse attention: dilated levels that overlap, queries sampled like keys (method.md 4).

The whole sequence in one process, cut into any number of segments; attention.dilated runs it with a segment
on each rank. Which tokens a head samples depends on positions only. Knows no rank and no model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_sps2.ops.attend import attend
from megatron_sps2.ops.merge import merge


def paper_levels(num_segments: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(group_sizes, degrees) for any number of segments: 8 -> (1, 2, 4, 8) twice, 6 -> (1, 2, 6) twice.

    Groups grow by the smallest factor that is left. The degree is the group size, so that on every level a
    head attends among as many tokens as a segment holds.
    """
    sizes = [1]
    while sizes[-1] < num_segments:
        left = num_segments // sizes[-1]
        sizes.append(sizes[-1] * next(f for f in range(2, left + 1) if left % f == 0))
    return tuple(sizes), tuple(sizes)


def check_levels(group_sizes: Sequence[int], degrees: Sequence[int], num_segments: int) -> None:
    """Raise ValueError unless the levels nest, widen from one segment to all, and start dense."""
    sizes, found = tuple(group_sizes), f"group_sizes={tuple(group_sizes)}"
    if len(sizes) != len(degrees) or not sizes:
        raise ValueError(f"{found} and degrees={tuple(degrees)} must name one level each; at least level 0")
    if sizes[0] != 1 or sizes[-1] != num_segments:
        raise ValueError(f"{found} must start with 1 and end with the number of segments, {num_segments}")
    for smaller, larger in zip(sizes, sizes[1:], strict=False):
        if larger <= smaller or larger % smaller:
            raise ValueError(
                f"{found} do not nest: each must be a multiple of the one before and larger, "
                f"but {larger} follows {smaller}"
            )
    if degrees[0] != 1 or min(degrees) < 1:
        raise ValueError(f"degrees={tuple(degrees)} must start with 1 (level 0 is dense) and be at least 1")


def sampled(start: int, kv_head: int, degree: int) -> slice:
    """Rows of the tokens p with p % degree == kv_head % degree, counted from position `start`."""
    return slice((kv_head - start) % degree, None, degree)


def dilated_pairs(
    lengths: Sequence[int], group_sizes: Sequence[int], degrees: Sequence[int], kv_head: int
) -> tuple[int, int]:
    """(scored, all) pairs of a query and a key of an earlier segment; one counts on each of its levels."""
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    scored = total = 0
    for reader, length in enumerate(lengths):
        for segment in range(reader):
            total += length * lengths[segment]
            for size, degree in zip(group_sizes, degrees, strict=True):
                if reader // size == segment // size:
                    queries, keys = (
                        len(range(*sampled(starts[i], kv_head, degree).indices(lengths[i])))
                        for i in (reader, segment)
                    )
                    scored += queries * keys
    return scored, total


def dilated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    boundaries: Sequence[int],
    group_sizes: Sequence[int],
    degrees: Sequence[int],
    scale: float,
    first_kv_head: int = 0,
) -> Tensor:
    """q `[s, b, n, d]`, k and v `[s, b, n_kv, d]` -> `[s, b, n, d]`.

    Segment i is boundaries[i] <= position < boundaries[i + 1]. On level l a group is group_sizes[l]
    neighbouring segments; among its sampled tokens, one of degrees[l], attention is causal. A near key counts
    once on every level that samples it, a query in every level that samples it. KV head i here is head
    first_kv_head + i of the model, so that heads sharded over tp sample as unsharded ones do.
    """
    check_levels(group_sizes, degrees, len(boundaries) - 1)
    assert boundaries[0] == 0 and boundaries[-1] == len(q), f"{boundaries} do not cover {len(q)} tokens"
    outs = q.new_empty(len(degrees), *q.shape)
    lses = q.new_full(outs.shape[:-1], -torch.inf, dtype=torch.float32)
    for level, (size, degree) in enumerate(zip(group_sizes, degrees, strict=True)):
        for start, stop in zip(boundaries[::size], boundaries[size::size], strict=False):
            span = slice(start, stop)
            picks = [sampled(start, first_kv_head + head, degree) for head in range(k.shape[2])]
            _attend_group(q[span], k[span], v[span], picks, scale, outs[level, span], lses[level, span])
    return merge(outs, lses)[0]


def _attend_group(
    q: Tensor, k: Tensor, v: Tensor, picks: list[slice], scale: float, out: Tensor, lse: Tensor
) -> None:
    """Fill what each KV head samples of out `[s, b, n, d]` and lse `[s, b, n]`; the s tokens are a group."""
    per_kv = q.shape[2] // k.shape[2]
    for head, rows in enumerate(picks):
        queries, kv = slice(head * per_kv, (head + 1) * per_kv), slice(head, head + 1)
        part = attend(q[rows, :, queries], k[rows, :, kv], v[rows, :, kv], scale=scale, diagonal=0)
        out[rows, :, queries], lse[rows, :, queries] = part
