"""New keys and values into the slots of a paged cache, turned before. Knows slots, not requests.

Slots are a tensor, for kernels; where the host knows runs of them, `ops.paged.write_paged` copies those.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_sps2.ops.paged import PagedKV
from megatron_sps2.ops.quantized import quantize
from megatron_sps2.ops.rotation import Rotation, rotate


def append_roped(
    q: Tensor, k: Tensor, v: Tensor, rotation: Rotation | None, kv: PagedKV, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """q `[s, n, d]`, k, v `[s, n_kv, d]`, slots int64 `[s]` -> q and k turned, new tensors.

    Turned keys and the values go into `slots`; -1: the token is not kept here. No rotation: q and k return as
    they came.
    """
    if rotation is not None:
        q, k = rotate(q, rotation), rotate(k, rotation)
    append(kv, slots, k, v)
    return q, k


def append(kv: PagedKV, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """k, v `[s, n_kv, d]` into `slots` int64 `[s]`, in the dtype that is kept; -1: not kept here.

    Slots of kept tokens differ. Waits for no device.
    """
    if not len(slots):
        return
    _put(kv.keys, kv.key_scales, slots, k)
    _put(kv.values, kv.value_scales, slots, v)


def _put(held: Tensor, scales: Tensor | None, slots: Tensor, new: Tensor) -> None:
    """held `[n_kv, num_slots, d]`, scales `[n_kv, num_slots]`, new `[s, n_kv, d]`."""
    heads = new.transpose(0, 1)
    if scales is None:
        _write(held, slots, heads.to(held.dtype))
        return
    numbers, own = quantize(heads)
    # Few operations know float8; bytes are moved as bytes.
    _write(held.view(torch.uint8), slots, numbers.view(torch.uint8))
    _write(scales, slots, own)


def _write(held: Tensor, slots: Tensor, new: Tensor) -> None:
    """new `[n_kv, s, ...]` into held `[n_kv, num_slots, ...]`, in place.

    How many tokens are kept only the device knows. A token that is not writes again what the first kept one
    writes; where none is, all write slot 0 as it was.
    """
    kept = slots >= 0
    tokens = torch.where(kept, torch.arange(len(slots), device=slots.device), kept.int().argmax())
    slots = slots[tokens].clamp_min(0)
    held[:, slots] = torch.where(kept.any(), new[:, tokens], held[:, slots])
