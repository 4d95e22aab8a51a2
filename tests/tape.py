"""In place of CudaRecorder, on CPU: operators are kept as they ran, and run again on the same tensors.

As in a CUDA graph, nothing that the host knew when they were recorded may matter when they run again, and a
result goes where the first one went. Collectives are operators, too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]


class _Listening(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        found = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, found))
        return found


class Tape:
    """Records and replays."""

    def __init__(self) -> None:
        self.num_replays = 0
        self.num_bytes = 0  # sent to other ranks by all-to-alls of replays

    def warm_up(self, body: Callable[[], Tensor]) -> None:
        """Nothing has to be made before."""

    def record(self, body: Callable[[], Tensor]) -> Callable[[], Tensor]:
        with _Listening() as listening:
            out = body()

        def replay() -> Tensor:
            self.num_replays += 1
            with torch.inference_mode():
                for call in listening.calls:
                    self._run(*call)
            return out

        return replay

    def _run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], first: Any) -> None:
        found = func(*args, **kwargs)
        if func.namespace == "c10d":
            tree_leaves(found)[-1].wait()
            if "alltoall" in func.__name__:
                self._count(*args[1:5])
            return
        held = {
            x.untyped_storage().data_ptr()
            for x in tree_leaves((args, kwargs))
            if isinstance(x, Tensor) and not x.is_mkldnn
        }
        for old, new in zip(tree_leaves(first), tree_leaves(found), strict=True):
            # A view, or written in place: it is there.
            if isinstance(old, Tensor) and old.untyped_storage().data_ptr() not in held:
                old.copy_(new)

    def _count(self, sent: Tensor, _: Any, __: Any, splits: list[int]) -> None:
        me = dist.get_rank() * len(splits) // dist.get_world_size()  # tp is innermost
        self.num_bytes += (len(sent) - splits[me]) * sent.element_size()
