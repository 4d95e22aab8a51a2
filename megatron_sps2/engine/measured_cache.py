"""The KV cache that all ranks have room for: what weights and the largest prefill, run once for it, leave.

fitting_cache.py does the arithmetic, device_memory.py asks the device.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence

import torch

from megatron_sps2.attention.kv_cache import KVCache
from megatron_sps2.config import CacheConfig, ModelConfig
from megatron_sps2.engine import device_memory
from megatron_sps2.engine.dry_prefill import DryPrefill, dry_prefills, largest_step, max_started_tokens
from megatron_sps2.engine.engine_config import EngineConfig
from megatron_sps2.engine.fitting_cache import Room, fit_cache
from megatron_sps2.engine.rank_memory import kv_layer_bytes, paused_row_bytes
from megatron_sps2.engine.runner import Runner
from megatron_sps2.model.gpt import GptForward
from megatron_sps2.parallel.collectives import gather_objects, leave_together
from megatron_sps2.parallel.groups import Axis
from megatron_sps2.parallel.shared_error import mark_shared


def measured_cache(
    config: EngineConfig, model: ModelConfig, world: Axis, run: Callable[[DryPrefill], int]
) -> CacheConfig:
    """Collective; `run` makes a cache, runs a dry prefill and forgets both.

    It gives the bytes that recorded decode steps keep, of which a peak of what is in use knows nothing.

    Raises ValueError where a request of max_model_len tokens has no room: on every rank alike where weights
    leave too little, on the rank whose memory did not suffice where that was found by running.
    """
    _refuse_shared_devices(config, world)
    layer = kv_layer_bytes(model, config.parallel.tp_size, config.dtype, config.kv_cache_dtype)
    block_bytes = model.num_layers * layer * config.block_size
    _fit(config, block_bytes, world, _room(config, lambda: None, 0))
    dry, recorded = list[Room](), list[int]()
    for one in dry_prefills(config, model):
        num_bytes = one.cache.num_blocks * block_bytes
        dry.append(_room(config, lambda one=one: recorded.append(run(one)), num_bytes))  # type: ignore[misc]
    largest = max(room.activations for room in dry) + max(recorded) + paused_bytes(config, model)
    last = dry[-1]  # libraries have taken what they need by now
    return _fit(config, block_bytes, world, Room(total=last.total, used=last.used, activations=largest))


def paused_bytes(config: EngineConfig, model: ModelConfig) -> int:
    """Of prompts that pause beside a largest step: long ones over all ranks, short ones all on this one."""
    started = max_started_tokens(config)
    if started is None:
        return 0
    schedule = config.schedule
    long = max(0, started - sum(largest_step(config)[0]))
    short = schedule.max_num_seqs * min(schedule.short_prompt_tokens, config.max_model_len)
    return (-(-long // config.parallel.sp_size) + short) * paused_row_bytes(model, config.dtype)


def _refuse_shared_devices(config: EngineConfig, world: Axis) -> None:
    if (device := torch.device(config.device)).type == "cuda":
        problem = shared_device(gather_objects((socket.gethostname(), device_memory.name_of(device)), world))
        if problem:
            leave_together()
            raise mark_shared(ValueError(problem))


def shared_device(places: Sequence[tuple[str, str]]) -> str:
    """What is wrong with ranks at these (host, device), if two are alike: what one leaves both would take."""
    for rank, place in enumerate(places):
        if (first := places.index(place)) != rank:
            return (
                f"ranks {first} and {rank} share {place[1]} of {place[0]}, where what each of them has left "
                "cannot be measured; give --kv-cache-gib"
            )
    return ""


def run_dry(dry: DryPrefill, runner: Runner, cache: KVCache, forward: GptForward, max_num_seqs: int) -> None:
    """The prefill, and logits of as many answers as may run at a time."""
    if dry.num_past:
        positions = range(dry.num_past) if forward.model.window_layers else ()
        cache.grant(0, list(dry.past_blocks))
        cache.extend(0, dry.num_past, positions)
    for plan in dry.plans:
        runner.run(plan)
    ids = torch.zeros(max_num_seqs, 1, dtype=torch.int64, device=cache.device)
    forward.logits(forward.embed(ids, ids[:, 0]))


def _room(config: EngineConfig, run: Callable[[], None], cache_bytes: int) -> Room:
    """On this rank; `cache_bytes` of what `run` holds are not activations."""
    try:
        found = device_memory.measure_memory(run, torch.device(config.device))
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"the largest prefill of max_model_len={config.max_model_len:,} tokens, and a KV cache of "
            f"{cache_bytes / 2**30:.2f} GiB for it, do not fit this device beside the weights; use a lower "
            f"--max-model-len or --max-num-batched-tokens, or more --sp or --tp ({error})"
        ) from error
    return Room(
        total=found.total, used=found.total - found.free, activations=max(0, found.peak - cache_bytes)
    )


def _fit(config: EngineConfig, block_bytes: int, world: Axis, mine: Room) -> CacheConfig:
    """The same on every rank."""
    rooms = gather_objects(mine, world)
    try:
        return fit_cache(config, block_bytes, rooms)
    except ValueError as error:
        leave_together()
        raise mark_shared(error) from None
