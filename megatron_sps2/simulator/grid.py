"""Which of a rank's messages leave its node: the rank grid laid over nodes. Plain integers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_sps2.config import ParallelConfig
from megatron_sps2.simulator.work import Work


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Ranks in order, tp innermost, so many to a node."""

    parallel: ParallelConfig
    devices_per_node: int

    @property
    def _tp_here(self) -> int:
        return min(self.parallel.tp_size, self.devices_per_node)

    @property
    def _sp_here(self) -> int:
        """Ranks of an sp group on one node."""
        return min(self.parallel.sp_size, max(1, self.devices_per_node // self.parallel.tp_size))

    def exchange(self, num_bytes: float, num_collectives: float) -> Work:
        """A prompt's heads on the sp axis, evenly to all others."""
        inside, outside, rounds = self._split(num_bytes, self.parallel.sp_size, self._sp_here)
        return Work(exchange_intra_bytes=inside, exchange_inter_bytes=outside) + self._rounds(
            num_collectives * rounds, bool(outside)
        )

    def sp_sent(self, num_bytes: float, num_collectives: float) -> Work:
        """Everything else on the sp axis."""
        return self._sent(num_bytes, num_collectives, self.parallel.sp_size, self._sp_here)

    def tp_sent(self, num_bytes: float, num_collectives: float) -> Work:
        """Sums of hidden states on the tp axis."""
        return self._sent(num_bytes, num_collectives, self.parallel.tp_size, self._tp_here)

    def _sent(self, num_bytes: float, num_collectives: float, size: int, here: int) -> Work:
        inside, outside, rounds = self._split(num_bytes, size, here)
        return Work(sent_intra_bytes=inside, sent_inter_bytes=outside) + self._rounds(
            num_collectives * rounds, bool(outside)
        )

    @staticmethod
    def _split(num_bytes: float, size: int, here: int) -> tuple[float, float, int]:
        if size == 1:
            return 0.0, 0.0, 0
        outside = num_bytes * (size - here) / (size - 1)
        return num_bytes - outside, outside, math.ceil(math.log2(size))

    @staticmethod
    def _rounds(count: float, leaves: bool) -> Work:
        return Work(inter_rounds=count) if leaves else Work(intra_rounds=count)
