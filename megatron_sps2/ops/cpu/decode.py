"""Decode attention on CPU: a whole batch in one call, each key and value read once, where it lies.

A row is cut into pieces of so many tokens whatever the batch and the threads: no bit of it depends on them.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_sps2.ops import paged
from megatron_sps2.ops.cpu.decode_kernel import attend_pieces, cut, join_pieces
from megatron_sps2.ops.paged import PagedKV, PagedRows

PIECE = 2048
# Keys of one head, for fewer of which a thread is not asked: they take some 50 us.
MIN_KEYS = 8192
# What numpy knows of the same size; other dtypes take torch's way.
NUMPY_VIEWS = {torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float8_e4m3fn: torch.uint8}


def attend_paged(q: Tensor, kv: PagedKV, rows: PagedRows, *, scale: float) -> tuple[Tensor, Tensor]:
    """As `ops.paged.attend_paged`, with sums and weights in fp32, on as many threads as torch has."""
    if kv.keys.dtype not in NUMPY_VIEWS:
        return paged.attend_paged(q, kv, rows, scale=scale)
    tables, starts, stops = (x.numpy() for x in rows.tensors(q.device))
    pieces, firsts = cut(starts, stops, PIECE)
    queries = (q.float() * scale).contiguous().numpy()
    keys, values = _as_numpy(kv.keys), _as_numpy(kv.values)
    scales = (_scales(x, len(keys)) for x in (kv.key_scales, kv.value_scales))
    attend = partial(attend_pieces, queries, keys, values, *scales, tables, kv.block_size, pieces)
    outs = np.empty((len(pieces), *queries.shape[1:]), np.float32)
    lses = np.empty(outs.shape[:2], np.float32)
    num_items, num_keys = len(pieces) * len(keys), int((stops - starts).sum()) * len(keys)
    num_shares = max(1, min(torch.get_num_threads(), num_items, num_keys // MIN_KEYS))
    others = [_threads().submit(attend, share, num_shares, outs, lses) for share in range(1, num_shares)]
    attend(0, num_shares, outs, lses)
    for other in others:
        other.result()
    out, lse = np.empty_like(queries), np.empty(queries.shape[:2], np.float32)
    join_pieces(outs, lses, firsts, out, lse)
    return torch.from_numpy(out).to(q.dtype), torch.from_numpy(lse)


def _as_numpy(stored: Tensor) -> Any:
    return stored.view(NUMPY_VIEWS[stored.dtype]).numpy()


def _scales(stored: Tensor | None, num_kv_heads: int) -> Any:
    return np.empty((num_kv_heads, 0), np.float32) if stored is None else stored.numpy()


@cache
def _threads() -> ThreadPoolExecutor:
    """As many as torch has, less this one; started as they are needed."""
    return ThreadPoolExecutor(max(1, torch.get_num_threads() - 1), thread_name_prefix="attend")
