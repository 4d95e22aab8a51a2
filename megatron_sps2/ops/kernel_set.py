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
)


def choose_kernels(wanted: str, device: torch.device, head_dim: int = HEAD_DIM_STEP) -> Kernels:
    """The set that 'auto', 'torch' or 'triton' means on `device`, for heads of that size.

    Raises ValueError for triton where it is not installed, or has no device to run on.
    """
    installed, interpreted = find_spec("triton") is not None, os.environ.get("TRITON_INTERPRET") == "1"
    fits = head_dim <= MAX_HEAD_DIM and head_dim % HEAD_DIM_STEP == 0
    if wanted == "torch" or (wanted == "auto" and not (installed and fits and device.type == "cuda")):
        return TORCH
    if not installed:
        raise ValueError("kernels='triton' but triton is not installed; pip install triton, or use 'torch'")
    if device.type != "cuda" and not interpreted:
        raise ValueError(
            f"kernels='triton' but the device is {device.type}; use 'torch', or set TRITON_INTERPRET=1, "
            "which is slow"
        )
    return triton_kernels()


def triton_kernels() -> Kernels:
    """Loaded with its first use: triton need not be installed."""
    from megatron_sps2.ops.kernels.append import append_roped, write_paged
    from megatron_sps2.ops.kernels.csa_attend import attend_kept
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
    )
