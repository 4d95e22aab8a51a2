"""Operators for which the host would wait for a device, found on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class HostWait(AssertionError):
    """An operator for which the host would wait for the device."""


class NoHostWaits(TorchDispatchMode):
    """Fails on operators that need a number of a tensor, or as many results as it says, on the host.

    And on tensors made of a list, which a device gets by a copy that waits.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        indices = (
            [x for x in args[1] if x is not None] if name in ("index", "index_put", "index_put_") else []
        )
        moves = name == "_to_copy" and kwargs.get("device", args[0].device) != args[0].device
        if (
            name in ("_local_scalar_dense", "nonzero", "masked_select", "equal", "lift_fresh")
            or any(index.dtype in (torch.bool, torch.uint8) for index in indices)
            or (
                name == "repeat_interleave" and isinstance(args[0], Tensor) and func._overloadname == "Tensor"
            )
            or moves
        ):
            raise HostWait(str(func))
        return func(*args, **kwargs)
