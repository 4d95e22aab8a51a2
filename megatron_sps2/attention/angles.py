"""Angles by which a step turns queries and keys itself, where Megatron's layers do not."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

# Of the step's rows here, by layer from 0: [s/P, 1, 1, r], or None for a layer that turns nothing.
AnglesOf = Callable[[int], Tensor | None]


def no_angles(layer: int) -> None:
    """For steps whose kernels leave turning to Megatron."""
