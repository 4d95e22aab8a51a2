"""What tests of the simulator and of `sps2 plan` share: requests, and a deployment on data-sheet devices."""

from __future__ import annotations

from typing import Any

from megatron_sps2.config import ParallelConfig
from megatron_sps2.simulator.arrivals import Arrival
from megatron_sps2.simulator.data_sheets import load_profile
from megatron_sps2.simulator.deployment import Deployment
from megatron_sps2.simulator.setting import Setting
from megatron_sps2.simulator.shapes import SHAPES

LONG_AND_SHORT = [
    Arrival(arrival_s=0.4 * i, num_prompt_tokens=65536 if i % 4 == 0 else 800, num_output_tokens=40)
    for i in range(16)
]


def base(model: str, **more: Any) -> Deployment:
    values: dict[str, Any] = {"longest": 70_000, **more}
    return Deployment(
        model=SHAPES[model],
        profile=load_profile("h100"),
        parallel=ParallelConfig(),
        setting=Setting.parse("sps2-exact"),
        **values,
    )
