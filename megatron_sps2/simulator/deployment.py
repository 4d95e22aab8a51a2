"""A model on a rank grid of one kind of device: does it fit, and what the simulator needs to run it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_sps2.config import CacheConfig, DType, KVCacheDType, ModelConfig, ParallelConfig, ScheduleConfig
from megatron_sps2.csa_setting import PRESETS, CsaSetting
from megatron_sps2.engine.auto_layout import GIB, USABLE
from megatron_sps2.engine.rank_memory import RankMemory, rank_memory
from megatron_sps2.simulator.arrivals import Arrival
from megatron_sps2.simulator.cost import CostModel
from megatron_sps2.simulator.counter import Counter
from megatron_sps2.simulator.profile import DeviceProfile
from megatron_sps2.simulator.replica import Setup
from megatron_sps2.simulator.setting import Setting
from megatron_sps2.simulator.simulation import Outcome, simulate

BLOCK_SIZE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of one rank; the cache gets what weights and computing leave."""

    usable: int
    weights: int
    activations: int  # of the longest piece of a prompt
    kv_per_token: int
    kv_needed: int  # of the rank's part of the longest request

    @property
    def kv_room(self) -> int:
        return self.usable - self.weights - self.activations

    @property
    def fits(self) -> bool:
        return self.kv_room >= self.kv_needed

    def __str__(self) -> str:
        needed = self.weights + self.activations + self.kv_needed
        parts = ", ".join(
            f"{size / GIB:.1f} {name}"
            for name, size in (
                ("weights", self.weights),
                ("KV of the longest request", self.kv_needed),
                ("to compute", self.activations),
            )
        )
        return f"{needed / GIB:.1f} GiB of {self.usable / GIB:.1f} ({parts})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What is served where, and how."""

    model: ModelConfig
    profile: DeviceProfile
    parallel: ParallelConfig
    setting: Setting
    longest: int  # tokens of prompt and answer
    dtype: DType = "bfloat16"
    kv_cache_dtype: KVCacheDType = "auto"
    max_num_seqs: int = 64
    tbt_slo_ms: float | None = None  # what sps2 aims for
    csa: CsaSetting = field(default_factory=lambda: PRESETS["default"])
    csa_beyond: float | None = None  # see attended.CsaKeys
    schedule: ScheduleConfig | None = None  # None: what the setting means
    num_blocks: int | None = None  # of KV on a rank; None: what the memory leaves

    @property
    def memory(self) -> Memory:
        size = self.longest
        whole = self._rank_memory(size)
        piece = self._rank_memory(min(self._schedule.max_num_batched_tokens, size))
        return Memory(
            usable=int(USABLE * self.profile.memory_bytes),
            weights=whole.weights,
            activations=(piece if self._schedule.policy == "sarathi" else whole).activations,
            kv_per_token=whole.kv_per_token,
            kv_needed=whole.kv,
        )

    @property
    def setup(self) -> Setup:
        """Raises ValueError where the longest request does not fit."""
        memory = self.memory
        if not memory.fits:
            raise ValueError(f"{self.longest:,} tokens need {memory} on each rank; use more --sp or --tp")
        # More blocks than all requests could fill only make lists long.
        most = (-(-self.longest // BLOCK_SIZE) + 2) * self.max_num_seqs
        blocks = self.num_blocks or min(memory.kv_room // (memory.kv_per_token * BLOCK_SIZE), most)
        return Setup(
            model=self.model,
            parallel=self.parallel,
            schedule=self._schedule,
            cache=CacheConfig(num_blocks=blocks, block_size=BLOCK_SIZE),
            csa=self._csa,
        )

    @property
    def cost(self) -> CostModel:
        counter = Counter(
            model=self.model,
            parallel=self.parallel,
            dtype=self.dtype,
            kv_cache_dtype=self.kv_cache_dtype,
            devices_per_node=self.profile.devices_per_node,
            csa=self._csa,
            csa_beyond=self.csa_beyond,
        )
        return CostModel(profile=self.profile, counter=counter)

    def run(self, planned: Sequence[Arrival]) -> Outcome:
        return simulate(self.setup, self.cost, planned, self.setting.attention)

    @property
    def _schedule(self) -> ScheduleConfig:
        return self.schedule or self.setting.schedule(self.max_num_seqs, self.tbt_slo_ms)

    @property
    def _csa(self) -> CsaSetting | None:
        return self.csa if self.setting.attention != "exact" else None

    def _rank_memory(self, longest: int) -> RankMemory:
        return rank_memory(
            self.model,
            self.parallel,
            dtype=self.dtype,
            kv_cache_dtype=self.kv_cache_dtype,
            max_model_len=longest,
            block_size=BLOCK_SIZE,
            output_copy=not self.model.tie_embeddings,
        )
