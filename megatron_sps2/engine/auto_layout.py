"""Which --sp and --tp serve a model on the devices there are: `auto`. Pure; looks at no machine.

The fewest tp ranks whose weights, KV and activations fit, and the other devices to sp: per layer tp sums all
hidden states twice, sp exchanges heads of a part of the tokens, which is less.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_sps2.config import DType, KVCacheDType, ModelConfig, ParallelConfig, divisors
from megatron_sps2.engine.rank_memory import RankMemory, rank_memory

# Of the memory that is free: the rest is for libraries, fragments, and what the formulas leave out.
USABLE = 0.9
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Devices:
    """What there is to spread a model over; one rank on each."""

    count: int
    per_node: int
    free_bytes: int  # of the fullest one
    kind: str  # as it is called in a sentence: CUDA device, CPU rank
    launched: bool = False  # a launcher has started a rank on each: all of them must be used


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is to be served. A size that is None is to be chosen."""

    model: ModelConfig
    longest: int  # tokens of prompt and answer
    dtype: DType
    block_size: int
    output_copy: bool
    dp_size: int
    sp_size: int | None
    tp_size: int | None
    kv_cache_dtype: KVCacheDType = "auto"

    def memory(self, parallel: ParallelConfig) -> RankMemory:
        return rank_memory(
            self.model,
            parallel,
            dtype=self.dtype,
            kv_cache_dtype=self.kv_cache_dtype,
            max_model_len=self.longest,
            block_size=self.block_size,
            output_copy=self.output_copy,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """A layout, and why it was chosen, in one line."""

    parallel: ParallelConfig
    why: str


def choose_layout(wish: Wish, devices: Devices) -> Choice:
    """Raises ValueError when no layout uses the devices, or the model fits none."""
    tried = list(_grids(wish, devices))
    if not tried:
        raise ValueError(_no_grid(wish, devices))
    room = int(USABLE * devices.free_bytes)
    for parallel in tried:
        if wish.memory(parallel).total <= room:
            return Choice(parallel=parallel, why=_why(wish, devices, tried, parallel))
    best = min(tried, key=lambda parallel: wish.memory(parallel).total)
    narrower = ", --dtype bfloat16" if wish.dtype == "float32" else ""
    narrower += ", --kv-cache-dtype fp8" if wish.kv_cache_dtype == "auto" else ""
    raise ValueError(
        f"{wish.longest:,} tokens in {wish.dtype} fit no layout on {_count(devices)}: {_grid(best)} needs "
        f"{_spell(wish.memory(best), wish.longest)} on each, and {_size(room)} may be used of "
        f"{_size(devices.free_bytes)} free; use more devices, a lower --max-model-len{narrower}"
    )


def _grids(wish: Wish, devices: Devices) -> Iterator[ParallelConfig]:
    """Every grid that the devices and the model allow, the fewest tp ranks first."""
    model, share = wish.model, devices.count // wish.dp_size
    fits = divisors(model.num_attention_heads, model.num_query_groups, model.ffn_hidden_size)
    for tp_size in [wish.tp_size] if wish.tp_size else fits:
        sp_size = wish.sp_size or share // tp_size
        if not 0 < sp_size * tp_size <= share:
            continue
        parallel = ParallelConfig(dp_size=wish.dp_size, sp_size=sp_size, tp_size=tp_size)
        if devices.launched and parallel.world_size != devices.count:
            continue
        # tp ranks are neighbours: in nodes of a multiple of tp_size ranks no group of them crosses nodes.
        one_node = devices.count <= devices.per_node
        if wish.tp_size or (tp_size <= devices.per_node and (one_node or devices.per_node % tp_size == 0)):
            parallel.check_model(model)
            yield parallel


def _why(wish: Wish, devices: Devices, tried: list[ParallelConfig], chosen: ParallelConfig) -> str:
    room = int(USABLE * devices.free_bytes)
    text = (
        f"{_grid(chosen)} on {_count(devices)}: a rank needs {_spell(wish.memory(chosen), wish.longest)}, "
        f"and {_size(room)} may be used of {_size(devices.free_bytes)} free"
    )
    if (index := tried.index(chosen)) > 0:
        text += f"; --tp {tried[index - 1].tp_size} would need {_size(wish.memory(tried[index - 1]).total)}"
    if (unused := devices.count - chosen.world_size) > 0:
        text += f"; {unused} of them stay unused"
    return text


def _no_grid(wish: Wish, devices: Devices) -> str:
    model = wish.model
    counts = (model.num_attention_heads, model.num_query_groups, model.ffn_hidden_size)
    wanted = f"--dp {wish.dp_size} --sp {wish.sp_size or 'auto'} --tp {wish.tp_size or 'auto'}"
    rule = "must be all of them" if devices.launched else "must not be more"
    return (
        f"{wanted} has no layout on {_count(devices)}, {devices.per_node} to a node: dp x sp x tp {rule}, tp "
        f"must divide num_attention_heads={counts[0]}, num_query_groups={counts[1]} and ffn_hidden_size="
        f"{counts[2]} ({', '.join(map(str, divisors(*counts)))}) and stay within a node; choose another "
        "size, or another number of ranks"
    )


def _grid(parallel: ParallelConfig) -> str:
    replicas = f"--dp {parallel.dp_size} " if parallel.dp_size > 1 else ""
    return f"{replicas}--sp {parallel.sp_size} --tp {parallel.tp_size}"


def _count(devices: Devices) -> str:
    return f"{devices.count} {devices.kind}{'s' if devices.count > 1 else ''}"


def _spell(memory: RankMemory, longest: int) -> str:
    return (
        f"{_size(memory.total)} ({_size(memory.weights)} weights, {_size(memory.kv)} KV of its part of "
        f"{longest:,} tokens, {_size(memory.activations)} to compute)"
    )


def _size(num_bytes: int) -> str:
    return f"{num_bytes / GIB:,.1f} GiB" if num_bytes >= GIB else f"{num_bytes / 2**20:,.1f} MiB"
