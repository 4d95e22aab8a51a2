"""Chunked prefill mixed with decodes, stall-free batching, as Sarathi-Serve does it (arXiv 2403.02310)."""

from __future__ import annotations

from megatron_sps2.engine.policies.choice import Choice, Desk, PolicyConfig
from megatron_sps2.engine.prefill_progress import Prefill


class SarathiPolicy:
    """A step decodes the running requests and fills its token budget with chunks of the oldest prompts."""

    chunked = True

    def __init__(self, config: PolicyConfig) -> None:
        self._budget = config.max_num_batched_tokens

    def choose(self, desk: Desk, now: float) -> Choice:
        room, chosen, stops = self._budget - len(desk.running), list[Prefill](), list[int]()
        for prefill in list(desk.prefilling):
            size = self._chunk(prefill.num_left, room, desk.block_size)
            if size:
                chosen.append(prefill)
                stops.append(prefill.start + size)
                room -= size
        for request in list(desk.waiting):
            least = min(desk.block_size, self._budget, request.num_new_tokens)
            if room < least or len(chosen) < len(desk.prefilling):
                break
            started = desk.start(request, chunked=True)
            if started is None:
                break
            size = self._chunk(started.num_left, room, desk.block_size)
            chosen.append(started)
            stops.append(started.start + size)
            room -= size
        return Choice(prefills=chosen, stops=stops, last_layer=desk.num_layers, decode=bool(desk.running))

    def observe(self, choice: Choice, seconds: float) -> None:
        """The budget alone bounds a step."""

    def _chunk(self, num_left: int, room: int, block_size: int) -> int:
        """Tokens of the next chunk: whole KV blocks, unless it is the last one or the budget is no block."""
        if num_left <= room:
            return num_left
        if self._budget < block_size:
            return max(0, room)
        return max(0, room) // block_size * block_size
