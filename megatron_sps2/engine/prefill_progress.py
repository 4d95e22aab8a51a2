"""A prefill that has begun: how far it is. Plain data of rank 0."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sps2.engine.plan import Blocks
from megatron_sps2.engine.request import Request


@dataclass(slots=True, eq=False)
class Prefill:
    """A request: its tokens before `start` are through all layers, those up to `stop` up to `next_layer`.

    Positions count the tokens that an earlier turn left in the cache. `stop` is None between two chunks.
    """

    request: Request
    start: int
    end: int  # of all that must be computed before the first token
    stop: int | None = None
    next_layer: int = 0
    strategy: str = ""
    turn: int = 0
    # What ranks are told with the next piece: new blocks, and with the first one a prefix filled by others.
    granted: Blocks = ()
    prefix: Blocks = ()
    is_new: bool = True  # no piece of it was planned yet

    @property
    def num_left(self) -> int:
        """Tokens that are not through all layers."""
        return self.end - self.start
