"""How a step turns queries and keys itself, where Megatron's layers do not."""

from __future__ import annotations

from collections.abc import Callable

from megatron_sps2.ops.rotation import Rotation

# Of the step's rows here, by layer from 0; None for a layer that turns nothing.
RotationOf = Callable[[int], Rotation | None]


def no_rotation(layer: int) -> None:
    """For steps whose kernels leave turning to Megatron."""
