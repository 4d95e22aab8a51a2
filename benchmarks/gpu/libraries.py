"""Attention of others through one signature, where it is here and takes the shape: what ours is beside."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.timing import milliseconds, on_every_turn

BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA flash": SDPBackend.FLASH_ATTENTION}
# Module and name of its attention over [b, s, n, d].
PACKAGES = {"FA3": ("flash_attn_interface", "flash_attn_func"), "FA2": ("flash_attn", "flash_attn_func")}

# Of a call with a KV head for every query head, for a backend that does not let them share.
REPEATED = ", KV repeated"


def library_times(q: Tensor, k: Tensor, v: Tensor, scale: float, diagonal: int | None) -> dict[str, float]:
    """q `[sq, b, n, d]`, k, v `[sk, b, n_kv, d]`, as `ops.attend.attend` -> milliseconds by name.

    Masks are causal over equally many queries and keys, or none: elsewhere libraries align them otherwise.
    """
    assert diagonal is None or (diagonal == 0 and len(q) == len(k)), "libraries would mask otherwise"
    found: dict[str, float] = {}
    for name, call in _calls(q, k, v, scale, diagonal == 0).items():
        if name.removesuffix(REPEATED) in found:
            continue
        with warnings.catch_warnings(), contextlib.suppress(RuntimeError, TypeError):
            warnings.simplefilter("ignore")  # torch says at length why a backend does not take it
            found[name] = milliseconds(on_every_turn(call), q.device)
    return found


def _calls(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> dict[str, Callable[[], object]]:
    queries, keys, values = [x.permute(1, 2, 0, 3).contiguous() for x in (q, k, v)]  # [b, n, s, d]
    tokens = [x.transpose(0, 1) for x in (q, k, v)]  # [b, s, n, d]
    repeated = cache(lambda: [x.repeat_interleave(q.shape[2] // k.shape[2], dim=1) for x in (keys, values)])

    def sdpa(backend: SDPBackend, kv: Callable[[], list[Tensor]]) -> Tensor:
        own_keys, own_values = kv()
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(
                queries, own_keys, own_values, is_causal=causal, scale=scale, enable_gqa=kv is not repeated
            )

    if q.device.type != "cuda":
        return {"SDPA": partial(sdpa, SDPBackend.MATH, lambda: [keys, values])}
    calls: dict[str, Callable[[], object]] = {}
    for name, backend in BACKENDS.items():
        calls[name] = partial(sdpa, backend, lambda: [keys, values])
        calls[name + REPEATED] = partial(sdpa, backend, repeated)
    for name, (module, function) in PACKAGES.items():
        attend = _imported(module, function)
        if attend is not None:
            calls[name] = partial(attend, *tokens, softmax_scale=scale, causal=causal)
    return calls


def _imported(module: str, function: str) -> Any:
    try:
        return getattr(import_module(module), function, None)
    except ImportError:
        return None
