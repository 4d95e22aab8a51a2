"""Blocks for prompts, chunks and new tokens, and what the next plan must tell the ranks of them.

Between the scheduler, which decides who runs, and the block manager, which counts blocks. Pure Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_sps2.engine.block_manager import BlockManager
from megatron_sps2.engine.placement import Placement
from megatron_sps2.engine.plan import Blocks
from megatron_sps2.engine.prefill_progress import Prefill
from megatron_sps2.engine.request import Request
from megatron_sps2.parallel.layout import TokenLayout


@dataclass(slots=True)
class Orders:
    """What the next plan tells the ranks before its layers run."""

    freed: list[int] = field(default_factory=list)
    swapped_out: list[int] = field(default_factory=list)
    swapped_in: list[tuple[int, Blocks]] = field(default_factory=list)


class Room:
    """Gives and takes blocks, and keeps the orders for the next plan."""

    def __init__(self, blocks: BlockManager, placement: Placement, watermark: float) -> None:
        self._blocks, self._placement = blocks, placement
        # Blocks of each shard that a new request leaves free while others run.
        self._watermark = int(watermark * blocks.config.num_blocks)
        self._orders = Orders()

    @property
    def block_size(self) -> int:
        return self._blocks.config.block_size

    @property
    def has_freed(self) -> bool:
        """Whether ranks still hold blocks that were given back here."""
        return bool(self._orders.freed)

    def take_orders(self) -> Orders:
        """All orders since the last plan."""
        orders, self._orders = self._orders, Orders()
        return orders

    def begin(self, request: Request, home: int | None, *, alone: bool, chunked: bool) -> Prefill | None:
        """A prefill on rank `home` or on all and its room (`chunked`: only looked for); None: no room.

        Whoever runs `alone` needs no watermark, and goes without a shared prefix that leaves it no room.
        """
        before, request.home = request.home, home
        for with_prefix in (True, False) if alone else (True,):
            prefill = self._try_begin(request, alone=alone, with_prefix=with_prefix)
            if prefill is not None:
                if not chunked:
                    self.extend(prefill, prefill.end)
                return prefill
        request.home = before
        return None

    def extend(self, prefill: Prefill, stop: int) -> None:
        """Blocks for the tokens up to `stop`. Raises KVCacheFull and changes nothing."""
        request, start = prefill.request, prefill.start
        layout, turn = self._layout(request, start, stop)
        granted = self._blocks.allocate(request.request_id, layout.tokens_per_rank)
        if request.num_past == 0:
            self._blocks.note_layout(request.request_id, start, layout)
        prefill.stop, prefill.turn, prefill.granted = stop, turn, granted
        prefill.strategy = self._placement.strategy(request, start)

    def append(self, request: Request) -> tuple[int, int | None]:
        """Room for the newest token -> (sp rank, the new block there or None). Raises KVCacheFull."""
        return self._blocks.append(request.request_id, request.home)

    def publish(self, prefill: Prefill) -> None:
        """All layers of an exact prompt are cached; later prompts may begin with its blocks."""
        request = prefill.request
        # What an earlier turn left is not known here, nor what lies where.
        if request.csa is None and not request.num_past:
            self._blocks.publish_prefix(request.request_id, request.token_ids[: prefill.end])

    def free(self, request_id: int) -> None:
        """Ranks forget the request, wherever its KV is."""
        self._blocks.free(request_id)
        self._orders.freed.append(request_id)
        self._orders.swapped_in = [each for each in self._orders.swapped_in if each[0] != request_id]

    def swap_out(self, request_id: int) -> bool:
        """Whether it is copied: what was to come back with the next plan is still in host memory."""
        back = [order for order in self._orders.swapped_in if order[0] != request_id]
        is_here = len(back) == len(self._orders.swapped_in)
        if is_here:
            self._orders.swapped_out.append(request_id)
        self._orders.swapped_in = back
        self._blocks.swap_out(request_id)
        return is_here

    def swap_in(self, request_id: int, *, alone: bool) -> bool:
        """Whether there was room."""
        blocks = self._blocks.swap_in(request_id, 0 if alone else self._watermark)
        if blocks is not None:
            self._orders.swapped_in.append((request_id, blocks))
        return blocks is not None

    def is_local(self, request: Request) -> bool:
        """Whether one rank holds all of its KV."""
        return sum(count > 0 for count in self._blocks.tokens_per_rank(request.request_id)) == 1

    def most_blocks(self, request: Request, *, chunked: bool) -> int:
        """On the fullest rank, at its full length; an answer's last token is never fed and needs no slot."""
        layout, _ = self._layout(request, request.num_past, request.num_tokens)
        most = self._blocks.most_blocks(
            request.request_id, layout.tokens_per_rank, request.params.max_tokens - 1
        )
        return max(most) + (chunked and self._placement.sp_size > 1)

    def blocks_needed(self, request: Request) -> int:
        """On the fullest rank, to begin."""
        layout, _ = self._layout(request, request.num_past, request.num_tokens)
        return -(-max(layout.tokens_per_rank) // self.block_size)

    def best_home(self, request: Request, load: Sequence[int]) -> int | None:
        """The rank for a request that lives on one: room, then least to compute, `load` included."""
        if self._placement.wants_csa(request):
            return None
        needed = -(-request.num_new_tokens // self.block_size) + self._watermark
        free, ids, may_share = self._blocks.num_free_blocks, request.token_ids, self.may_share(request)
        fits = [rank for rank in range(self._placement.sp_size) if free[rank] >= needed]

        def preference(rank: int) -> tuple[int, int]:
            cached = self._blocks.num_cached_tokens(ids, rank) if may_share else 0
            return load[rank] - cached, -free[rank]

        return min(fits, key=preference, default=None)

    def may_share(self, request: Request) -> bool:
        """Whether its prompt is looked up among the blocks of others."""
        return self._blocks.prefix_caching and self._placement.may_share(request)

    def _try_begin(self, request: Request, *, alone: bool, with_prefix: bool) -> Prefill | None:
        prefill = Prefill(request, request.num_past, request.num_tokens)
        may_share, request_id = self.may_share(request), request.request_id
        if may_share and with_prefix:
            found = self._blocks.adopt_prefix(request_id, request.token_ids, request.home)
            prefill.prefix = tuple(map(tuple, found)) if any(found) else ()
        request.num_cached = sum(map(len, prefill.prefix)) * self.block_size
        prefill.start += request.num_cached
        layout, _ = self._layout(request, prefill.start, prefill.end)
        if not self._fits(request_id, layout, spare=0 if alone else self._watermark):
            if may_share:
                self._blocks.free(request_id)
            return None
        return prefill

    def _fits(self, request_id: int, layout: TokenLayout, spare: int) -> bool:
        held, blocks = self._blocks.tokens_per_rank(request_id), self._blocks.blocks_per_rank(request_id)
        return all(
            (wanted := -(-(old + new) // self.block_size) - count) <= 0 or wanted + spare <= free
            for old, new, count, free in zip(
                held, layout.tokens_per_rank, blocks, self._blocks.num_free_blocks, strict=True
            )
        )

    def _layout(self, request: Request, start: int, stop: int) -> tuple[TokenLayout, int]:
        """The layout that leaves the request's shards most level, and its turn."""
        held = self._blocks.tokens_per_rank(request.request_id)
        turn = self._placement.best_turn(request, start, stop, held)
        return self._placement.layout(request, start, stop, turn), turn
