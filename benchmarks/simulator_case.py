"""What the simulator is held against: traces, and an engine and a simulation that are told the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_sps2.config import (
    BATCHED_TOKENS,
    DType,
    ModelConfig,
    ParallelConfig,
    PolicyName,
    ScheduleConfig,
)
from megatron_sps2.engine.build import EngineConfig
from megatron_sps2.model.manifest import load_model_config
from megatron_sps2.simulator.arrivals import Arrival
from megatron_sps2.simulator.cost import CostModel
from megatron_sps2.simulator.counter import Counter
from megatron_sps2.simulator.fit import Observation, as_profile, fit
from megatron_sps2.simulator.profile import DeviceProfile
from megatron_sps2.simulator.replica import Setup
from megatron_sps2.simulator.setting import SHORT_PROMPT_TOKENS

LONGEST = 6144
MAX_NUM_SEQS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Lengths of a trace: (share, least, most) of prompts, and (least, most) of answers."""

    name: str
    prompts: tuple[tuple[float, int, int], ...]
    answers: tuple[int, int]
    seed: int

    def trace(self, num_requests: int, rate: float) -> list[Arrival]:
        rng = np.random.default_rng(self.seed)
        arrivals = np.cumsum(rng.exponential(1 / rate, num_requests))
        shares = [share for share, _, _ in self.prompts]
        found = []
        for arrival in arrivals - arrivals[0]:
            _, least, most = self.prompts[rng.choice(len(shares), p=shares)]
            found.append(
                Arrival(
                    arrival_s=float(arrival),
                    num_prompt_tokens=int(rng.integers(least, most)),
                    num_output_tokens=int(rng.integers(*self.answers)),
                )
            )
        return found


MIXES = (
    Mix(name="calibration", prompts=((0.8, 64, 700), (0.2, 1000, 4000)), answers=(16, 64), seed=1),
    Mix(name="held out", prompts=((0.5, 100, 1500), (0.5, 1500, 5500)), answers=(8, 48), seed=2),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What the ranks and the simulator are both told."""

    checkpoint: str
    model: ModelConfig
    parallel: ParallelConfig
    dtype: DType
    schedule: ScheduleConfig

    @property
    def engine(self) -> EngineConfig:
        return EngineConfig(
            checkpoint=self.checkpoint,
            parallel=self.parallel,
            dtype=self.dtype,
            max_model_len=LONGEST,
            schedule=self.schedule,
        )

    @property
    def setup(self) -> Setup:
        return Setup(
            model=self.model, parallel=self.parallel, schedule=self.schedule, cache=self.engine.sized_cache()
        )

    @property
    def counter(self) -> Counter:
        return Counter(
            model=self.model,
            parallel=self.parallel,
            dtype=self.dtype,
            devices_per_node=self.parallel.world_size,
        )

    def cost(self, observations: Sequence[Observation]) -> CostModel:
        return CostModel(profile=self.profile(observations), counter=self.counter)

    def profile(self, observations: Sequence[Observation]) -> DeviceProfile:
        return as_profile(
            fit(observations, self.parallel.world_size),
            name="here",
            source="measured by benchmarks.simulator_error",
            dtype=self.dtype,
            memory_bytes=1,
            devices_per_node=self.parallel.world_size,
            notes={"sp": self.parallel.sp_size, "tp": self.parallel.tp_size},
        )


def case_of(checkpoint: str, sp_size: int, policy: PolicyName, dtype: DType) -> Case:
    return Case(
        checkpoint=checkpoint,
        model=load_model_config(checkpoint),
        parallel=ParallelConfig(sp_size=sp_size),
        dtype=dtype,
        schedule=ScheduleConfig(
            policy=policy,
            max_num_seqs=MAX_NUM_SEQS,
            max_num_batched_tokens=BATCHED_TOKENS[policy],
            short_prompt_tokens=SHORT_PROMPT_TOKENS,
        ),
    )
