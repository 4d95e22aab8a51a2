"""Prefill attention by a library where one serves the call, else by a kernel of ours. Knows tensors only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sps2.ops.attend import Attend, Values
from megatron_sps2.ops.kernels.library import LIBRARIES, Library

HOPPER = (9, 0)


@dataclass(frozen=True, slots=True)
class Preference:
    """Which calls a library gets of those that it fits."""

    min_queries: int
    prompts_alone: bool  # causal calls with as many keys as queries


# Written for Hopper's matmuls and kept fast by others; the rest of LIBRARIES is there to be measured beside.
# Few queries fill a card only where keys are split, as ours does. cuDNN makes a plan for each new length, in
# tenths of a second: for long prompts, not for the chunks of one.
PREFERENCES = {
    "flash-attention-3": Preference(min_queries=128, prompts_alone=False),
    "cudnn": Preference(min_queries=16384, prompts_alone=True),
}


def preferred_libraries(device: torch.device) -> list[Library]:
    """Those installed, the first one first; none before Hopper. That they are right here is to be tried."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < HOPPER:
        return []
    return [each for each in LIBRARIES if each.name in PREFERENCES and each.installed]


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
    """`ops.attend.attend`, by the first of `libraries` that gets the call.

    A library may let heads that share a call change the last bits of each other.
    """
    for library in libraries:
        if gets(PREFERENCES[library.name], q, k, diagonal) and library.fits(q, k, diagonal):
            return library.attend(q, k, v, scale=scale, diagonal=diagonal)
    return otherwise(q, k, v, scale=scale, diagonal=diagonal)


def gets(preference: Preference, q: Tensor, k: Tensor, diagonal: int | None) -> bool:
    """Whether a library of that preference is asked first."""
    is_prompt = diagonal == 0 and len(q) == len(k)
    return len(q) >= preference.min_queries and (is_prompt or not preference.prompts_alone)
