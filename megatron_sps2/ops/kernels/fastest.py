"""Prefill attention by a library where one serves the call, else by a kernel of ours. Knows tensors only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_sps2.ops.attend import Attend, Values
from megatron_sps2.ops.kernels.library import LIBRARIES, Library

# Written for Hopper's matmuls and kept fast by others. The rest of LIBRARIES is there to be measured beside.
PREFERRED = ("flash-attention-3", "cudnn")
HOPPER = (9, 0)
# Our kernel alone splits keys, where queries are too few to fill a card.
MIN_QUERIES = 128


def preferred_libraries(device: torch.device) -> list[Library]:
    """Those installed, the first one first; none before Hopper. That they are right here is to be tried."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < HOPPER:
        return []
    return [each for each in LIBRARIES if each.name in PREFERRED and each.installed]


def attend_fastest(
    q: Tensor,
    k: Tensor,
    v: Values,
    *,
    scale: float,
    diagonal: int | None,
    libraries: Sequence[Library],
    otherwise: Attend,
) -> tuple[Tensor, Tensor]:
    """`ops.attend.attend`, by the first of `libraries` that the call fits."""
    if len(q) >= MIN_QUERIES:
        for library in libraries:
            if library.fits(q, k, diagonal):
                return library.attend(q, k, v, scale=scale, diagonal=diagonal)
    return otherwise(q, k, v, scale=scale, diagonal=diagonal)
