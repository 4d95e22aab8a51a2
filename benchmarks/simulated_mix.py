"""Long and short prompts on a simulated deployment, and what its ranks can take of them."""

from __future__ import annotations

import numpy as np

from megatron_sps2.config import ModelConfig, ParallelConfig
from megatron_sps2.engine.plan import PrefillPiece, StepPlan
from megatron_sps2.simulator.arrivals import Arrival
from megatron_sps2.simulator.data_sheets import load_profile
from megatron_sps2.simulator.deployment import Deployment
from megatron_sps2.simulator.setting import Setting

K = 1024
ANSWER = (64, 256)
SHORT = (128, 2048)
LONG_SHARE = 0.3


def trace(longest: int, num_requests: int, rate: float, seed: int = 0) -> list[Arrival]:
    """Poisson arrivals; LONG_SHARE of the prompts are half to all of `longest`, the others short."""
    rng = np.random.default_rng(seed)
    times = np.cumsum(rng.exponential(1 / rate, num_requests))
    found = []
    for number in range(num_requests):
        is_long = number % 10 < 10 * LONG_SHARE
        least, most = (longest // 2, longest) if is_long else SHORT
        found.append(
            Arrival(
                arrival_s=float(times[number]),
                num_prompt_tokens=int(rng.integers(least, most)),
                num_output_tokens=int(rng.integers(*ANSWER)),
            )
        )
    return found


def deployment(
    profile: str, model: ModelConfig, parallel: ParallelConfig, setting: str, longest: int
) -> Deployment:
    return Deployment(
        model=model,
        profile=load_profile(profile),
        parallel=parallel,
        setting=Setting.parse(setting),
        longest=longest + ANSWER[1],
        max_num_seqs=64,
    )


def prefill_s(option: Deployment, num_tokens: int) -> float:
    """Of one prompt alone, in one piece or in sarathi's chunks."""
    layers, sp_size, csa = option.model.num_layers, option.parallel.sp_size, option.setting.attention == "csa"
    groups = option.model.num_query_groups // option.parallel.tp_size
    whole = "csa" if csa else "ulysses" if groups % sp_size == 0 else "pass_kv"
    size = option.setting.chunk if option.setting.policy == "sarathi" else num_tokens
    cost, seconds = option.cost, 0.0
    for start in range(0, num_tokens, size):
        piece = PrefillPiece(
            request_id=0,
            start=start,
            stop=min(num_tokens, start + size),
            first_layer=0,
            last_layer=layers,
            strategy="pass_q" if start else whole,
        )
        seconds += cost.seconds(StepPlan(pieces=(piece,)), 0)
    return seconds


def capacity(option: Deployment, longest: int) -> float:
    """Prompts per second of the mix that one replica can prefill, answers aside."""
    mix = trace(longest, 20, 1.0)
    return len(mix) / sum(prefill_s(option, each.num_prompt_tokens) for each in mix)
