"""The functions that compute a rank's share of attention, as one set that is chosen once for an engine.

`torch` runs anywhere and is what the others are held against.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from megatron_sps2.ops.attend import Attend, attend
from megatron_sps2.ops.kept import KeySelector, TorchSelector, attend_kept
from megatron_sps2.ops.kernels import HEAD_DIM_STEP, MAX_HEAD_DIM
from megatron_sps2.ops.merge import merge
from megatron_sps2.ops.pack import Packing, Parcels, lay_out, pack, unite
from megatron_sps2.ops.paged import PagedKV, Slots, attend_paged, write_paged


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Each as the function of the same name, which says what it takes and gives."""

    name: str
    attend: Attend
    merge: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    attend_paged: Callable[..., tuple[Tensor, Tensor]]
    write_paged: Callable[[PagedKV, Slots, Tensor, Tensor], None]
    # CSA's: a class, for keys are scored first and chosen once all ranks' scores are known.
    key_selector: type[KeySelector]
    attend_kept: Callable[..., Iterator[None]]
    unite: Callable[[Tensor, Parcels], Packing]
    pack: Callable[[Tensor, Tensor, Packing, Parcels, int], Tensor]
    lay_out: Callable[[Tensor, Packing, Parcels, Tensor, Tensor], None]
    # None: Megatron's layers turn queries and keys, and write_paged keeps keys and values.
    append_roped: Callable[..., tuple[Tensor, Tensor]] | None = None


TORCH = Kernels(
    name="torch",
    attend=attend,
    merge=merge,
    attend_paged=attend_paged,
    write_paged=write_paged,
    key_selector=TorchSelector,
    attend_kept=attend_kept,
    unite=unite,
    pack=pack,
    lay_out=lay_out,
)


def choose_kernels(wanted: str, device: torch.device, head_dim: int = HEAD_DIM_STEP) -> Kernels:
    """The set that `wanted` means on `device`, for heads of that size: one of config's KERNEL_CHOICES.

    Raises ValueError for one that is not installed, or does not run on that device.
    """
    if wanted == "auto":
        wanted = _fastest(device, head_dim)
    if wanted == "torch":
        return TORCH
    if find_spec(wanted) is None:
        raise ValueError(
            f"kernels={wanted!r} but {wanted} is not installed; pip install {wanted}, or use 'torch'"
        )
    if wanted == "numba":
        if device.type != "cpu":
            raise ValueError(f"kernels='numba' but the device is {device.type}; use 'triton' or 'torch'")
        return numba_kernels()
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"kernels='triton' but the device is {device.type}; use 'numba' or 'torch', or set "
            "TRITON_INTERPRET=1, which is slow"
        )
    return triton_kernels()


def _fastest(device: torch.device, head_dim: int) -> str:
    """Of the sets that are installed and made for `device`."""
    if device.type == "cpu":
        return "numba" if find_spec("numba") else "torch"
    fits = head_dim <= MAX_HEAD_DIM and head_dim % HEAD_DIM_STEP == 0
    return "triton" if fits and device.type == "cuda" and find_spec("triton") else "torch"


def numba_kernels() -> Kernels:
    """Loaded with its first use: Numba takes half a second."""
    from megatron_sps2.ops.cpu.decode import attend_paged

    return replace(TORCH, name="numba", attend_paged=attend_paged)


def triton_kernels() -> Kernels:
    """Loaded with its first use: triton need not be installed."""
    from megatron_sps2.ops.kernels.append import append_roped, write_paged
    from megatron_sps2.ops.kernels.csa_attend import attend_kept
    from megatron_sps2.ops.kernels.csa_pack import lay_out, pack, unite
    from megatron_sps2.ops.kernels.csa_select import TritonSelector
    from megatron_sps2.ops.kernels.decode import attend_paged
    from megatron_sps2.ops.kernels.merge import merge_partials
    from megatron_sps2.ops.kernels.prefill import attend_prefill

    return replace(
        TORCH,
        name="triton",
        attend=attend_prefill,
        merge=merge_partials,
        attend_paged=attend_paged,
        write_paged=write_paged,
        append_roped=append_roped,
        key_selector=TritonSelector,
        attend_kept=attend_kept,
        unite=unite,
        pack=pack,
        lay_out=lay_out,
    )
