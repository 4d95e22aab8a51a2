"""Rows of a decode batch and the pages they attend to, for tests: whatever is not attended is NaN."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_sps2.ops.paged import PagedKV, PagedRows, attend_paged_reference
from megatron_sps2.ops.quantized import quantize

AttendPaged = Callable[..., tuple[Tensor, Tensor]]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Sums of up to 700 fp32 terms in another order.
FP32_TOLERANCE = 1e-5
# Tokens start <= t < stop of a row: none, one, a part of a block, windows, up to three splits of 256.
MIXED = [(0, 0), (0, 1), (3, 77), (0, 256), (100, 357), (5, 705), (0, 16)]


def make_rows(spans: list[tuple[int, int]], block_size: int) -> PagedRows:
    """Rows whose blocks are scattered; every second one is nobody's, the first too."""
    counts = [-(-stop // block_size) for _, stop in spans]
    places = (1 + 2 * torch.randperm(sum(counts))).tolist()
    tables = [[places.pop() for _ in range(count)] for count in counts]
    starts, stops = ([*each] for each in zip(*spans, strict=True))
    return PagedRows(tables, starts, stops, block_size)


def make_kv(
    rows: PagedRows, num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device = DEVICE
) -> PagedKV:
    """Random numbers where rows attend, NaN elsewhere."""
    num_slots = 2 * sum(map(len, rows.tables)) * rows.block_size + rows.block_size
    attended = torch.zeros(num_slots, dtype=torch.bool)
    for runs in rows.runs:
        for run in runs:
            attended[run.start : run.stop] = True
    held = torch.randn(2, num_kv_heads, num_slots, head_dim)
    held[:, :, ~attended] = torch.nan
    keys, values = held.to(device=device, dtype=dtype)
    return PagedKV(keys, values, rows.block_size)


def as_float8(kv: PagedKV) -> PagedKV:
    """The same in float8, numbers of very different sizes; scales of what is not attended are NaN."""
    sizes = torch.logspace(-6, 1, kv.keys.shape[1], device=kv.keys.device)[torch.randperm(kv.keys.shape[1])]
    (keys, key_scales), (values, value_scales) = quantize(kv.keys), quantize(kv.values * sizes[:, None])
    return PagedKV(keys, values, kv.block_size, key_scales, value_scales)


def make_queries(
    rows: PagedRows, num_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device = DEVICE
) -> Tensor:
    return torch.randn(len(rows), num_heads, head_dim).to(device=device, dtype=dtype)


def assert_right(
    attend: AttendPaged, q: Tensor, kv: PagedKV, rows: PagedRows, tolerance: float = FP32_TOLERANCE
) -> None:
    """`attend` gives what attention written out gives."""
    scale = q.shape[2] ** -0.5
    found = attend(q, kv, rows, scale=scale)
    assert found[0].dtype == q.dtype and found[1].dtype == torch.float32
    for x, y in zip(found, attend_paged_reference(q, kv, rows, scale=scale), strict=True):
        torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance)


def assert_rows_are_alone(attend: AttendPaged, q: Tensor, kv: PagedKV, rows: PagedRows) -> None:
    """No bit of a row depends on its batch."""
    outs, lses = attend(q, kv, rows, scale=0.125)
    for i, (table, start, stop) in enumerate(zip(rows.tables, rows.starts, rows.stops, strict=True)):
        alone = PagedRows([table], [start], [stop], rows.block_size)
        out, lse = attend(q[i : i + 1], kv, alone, scale=0.125)
        assert torch.equal(out[0], outs[i]) and torch.equal(lse[0], lses[i]), f"row {i}"
