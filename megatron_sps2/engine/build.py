"""From settings and an initialised world to an Engine: groups, weights, cache.

Compares what the ranks were told before anything is built: two configs never meet inside a collective.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.distributed as dist

import megatron_sps2.model.eager  # noqa: F401  # before all others: some of them import Megatron
from megatron_sps2.attention.core import SequenceParallelAttention, StepContext
from megatron_sps2.attention.kv_cache import KVCache
from megatron_sps2.config import CacheConfig, ModelConfig
from megatron_sps2.engine.block_manager import BlockManager
from megatron_sps2.engine.csa_reporter import CsaReporter
from megatron_sps2.engine.decode_graph import CudaRecorder
from megatron_sps2.engine.dry_prefill import DryPrefill, max_started_tokens
from megatron_sps2.engine.engine import Engine, Place
from megatron_sps2.engine.engine_config import EngineConfig
from megatron_sps2.engine.kernel_check import Heads, settle_kernels
from megatron_sps2.engine.measured_cache import measured_cache, run_dry
from megatron_sps2.engine.runner import Runner
from megatron_sps2.engine.scheduler import Scheduler
from megatron_sps2.engine.start_up import StartUp
from megatron_sps2.model.checkpoint import load_gpt
from megatron_sps2.model.gpt import GptForward
from megatron_sps2.model.heap import keep_freed_memory
from megatron_sps2.model.manifest import load_model_config, read_manifest
from megatron_sps2.ops.kernel_set import Kernels, choose_kernels
from megatron_sps2.parallel.collectives import Wire, gather_objects, leave_together, tell_all
from megatron_sps2.parallel.groups import ParallelGroups, world_axis
from megatron_sps2.parallel.ledger import Ledger
from megatron_sps2.parallel.mailbox import open_mailbox
from megatron_sps2.parallel.shared_error import mark_shared
from megatron_sps2.parallel.traffic import Traffic

logger = logging.getLogger(__name__)

NOT_RECORDED = (
    "decode steps cannot be recorded here, use --enforce-eager, or where memory is short a lower "
    "--max-num-seqs: "
)

__all__ = ["EngineConfig", "assemble", "build_engine", "compare_ranks"]


def build_engine(config: EngineConfig) -> Engine:
    """Collective over the whole, initialised world.

    Raises on every rank alike: RuntimeError when ranks were told different things, ValueError for a tp_size
    that does not fit the model, FileNotFoundError or ValueError for a checkpoint that cannot be read.
    """
    compare_ranks(config)
    model = load_model_config(config.checkpoint)
    config.parallel.check_model(model)
    check_windows(config, model)
    if config.csa is not None:
        config.csa.check_model(model, read_manifest(config.checkpoint).content_id)
    groups = ParallelGroups.create(config.parallel, timeout=timedelta(seconds=config.timeout_s))
    context, start = StepContext(), time.perf_counter()
    forward = load_gpt(
        config.checkpoint,
        groups.to_megatron(),
        functools.partial(SequenceParallelAttention, context=context),
        getattr(torch, config.dtype),
        config.device,
    )
    loaded = time.perf_counter()
    kernels = settle_kernels(config.attention.kernels, heads_of(config, model), groups.world)
    if config.cache is None and config.gpu_memory_utilization is not None:
        cache = _measured_cache(config, groups, forward, context, kernels)
        schedule = replace(config.schedule, max_started_tokens=max_started_tokens(config))
        config = replace(config, cache=cache, schedule=schedule)
    engine = assemble(config, groups, forward, context, kernels)
    mine = StartUp.now(loaded - start, forward.weight_bytes)
    engine.start_up = gather_objects(mine, groups.world)
    return engine


def check_windows(config: EngineConfig, model: ModelConfig) -> None:
    """Raises ValueError for what a model with windowed layers is not served with; CSA has its own check."""
    if model.window_layers and config.schedule.prefix_caching:
        raise ValueError(
            f"prefix caching does not know windows, and {len(model.window_layers)} layers of the model see "
            f"only the last {model.window} tokens; leave --prefix-caching away"
        )


def assemble(
    config: EngineConfig,
    groups: ParallelGroups,
    forward: GptForward,
    context: StepContext,
    kernels: Kernels | None = None,
) -> Engine:
    """An Engine around a loaded model whose layers are bound to `context`; `kernels` as they are settled."""
    model, ledger, device = forward.model, Ledger(), torch.device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    cache_config = config.sized_cache()
    cache = make_cache(config, model, cache_config)
    forward.book_traffic(ledger)
    mailbox = None
    if device.type == "cpu":
        gather = functools.partial(gather_objects, axis=groups.sp)
        mailbox = open_mailbox(groups.sp, gather, config.timeout_s, num_local_ranks=groups.world.size)
    kernels = kernels or choose_kernels(config.attention.kernels, device, model.head_dim)
    sp = Wire(groups.sp, ledger, mailbox)
    runner = make_runner(config, groups, forward, context, cache, sp, kernels)
    record_graphs(runner, config, model, groups)
    blocks = BlockManager(
        cache_config, config.parallel.sp_size, prefix_caching=config.schedule.prefix_caching
    )
    scheduler = Scheduler(
        model,
        config.parallel,
        config.attention,
        blocks,
        config.schedule,
        csa=config.csa,
    )
    traffic = Traffic(model=model, parallel=config.parallel, element_size=cache.element_size)
    return Engine(
        model,
        runner,
        scheduler,
        blocks,
        Wire(groups.engine, ledger),
        ledger,
        max_model_len=config.max_model_len,
        device=device,
        attention=config.attention.mode,
        place=Place(
            rank=groups.world.rank,
            replica=groups.dp.rank,
            sp_rank=groups.sp.rank,
            tp_rank=groups.tp.rank,
        ),
        reporter=CsaReporter(setting=config.csa, traffic=traffic, exact_strategy=scheduler.exact_strategy),
    )


def record_graphs(runner: Runner, config: EngineConfig, model: ModelConfig, groups: ParallelGroups) -> int:
    """Where decode steps can be graphs -> bytes that these keep of the device. Collective over the world.

    Raises RuntimeError on every rank where they cannot be recorded, or are off, on any. A rank that fails
    where others wait for it, as in a warm-up, raises alone and at once; they hear of its end by heartbeat.
    """
    if not records_decode(config, model, runner.kernels, groups.engine.size, dist.get_backend()):
        return 0
    recorder = CudaRecorder()
    with _explained():
        runner.warm_up_decode(
            recorder, max_rows=config.schedule.max_num_seqs, max_tokens=config.max_model_len
        )
    problem = ""
    try:
        with _explained():
            runner.record_decode()
    except RuntimeError as error:
        problem = str(error)
        logger.error("%s", problem)
    tell_all(problem, groups.world)
    with _explained():
        off = runner.check_recorded()
    tell_all(off and NOT_RECORDED + off, groups.world)
    return recorder.num_bytes


@contextmanager
def _explained() -> Iterator[None]:
    """For a step of recording, which CUDA or NCCL may end in any way."""
    try:
        yield
    except Exception as error:
        first = f" (after {error.__context__!r})" if error.__context__ else ""
        raise RuntimeError(f"{NOT_RECORDED}{type(error).__name__}: {error}{first}") from error


def records_decode(
    config: EngineConfig, model: ModelConfig, kernels: Kernels, num_ranks: int, backend: str
) -> bool:
    """Whether decode steps become CUDA graphs.

    A mixture does not fit in, for the host reads who goes where, nor do messages by way of the host.
    """
    on_device = config.device.startswith("cuda") and kernels.append_roped is not None
    recordable = not model.num_experts and (num_ranks == 1 or backend == "nccl")
    return on_device and recordable and not config.enforce_eager


def make_cache(config: EngineConfig, model: ModelConfig, size: CacheConfig) -> KVCache:
    """This rank's shard."""
    return KVCache(
        size,
        num_layers=model.num_layers,
        num_kv_heads=model.num_query_groups // config.parallel.tp_size,
        head_dim=model.head_dim,
        dtype=getattr(torch, config.dtype),
        device=config.device,
        kv_cache_dtype=config.kv_cache_dtype,
    )


def make_runner(
    config: EngineConfig,
    groups: ParallelGroups,
    forward: GptForward,
    context: StepContext,
    cache: KVCache,
    sp: Wire,
    kernels: Kernels,
) -> Runner:
    """What runs steps on this rank; all that it sends is booked where `sp` books."""
    return Runner(
        forward,
        cache,
        context,
        sp,
        overlap=config.attention.pipeline,
        device=config.device,
        replica=Wire(groups.engine, sp.ledger),
        csa=config.csa,
        tp_rank=groups.tp.rank,
        unit=cache.config.block_size if config.schedule.prefix_caching else 1,
        kernels=kernels,
    )


def heads_of(config: EngineConfig, model: ModelConfig) -> Heads:
    """What kernels meet on a rank."""
    return Heads(
        num_heads=model.num_attention_heads // config.parallel.tp_size,
        num_kv_heads=model.num_query_groups // config.parallel.tp_size,
        head_dim=model.head_dim,
        dtype=getattr(torch, config.dtype),
        block_size=config.cache.block_size if config.cache else config.block_size,
        fp8=config.kv_cache_dtype == "fp8",
        device=torch.device(config.device),
    )


def _measured_cache(
    config: EngineConfig,
    groups: ParallelGroups,
    forward: GptForward,
    context: StepContext,
    kernels: Kernels,
) -> CacheConfig:
    """What all ranks have room for beside weights and the largest prefill. Collective over the world."""

    def run(dry: DryPrefill) -> int:
        cache = make_cache(config, forward.model, dry.cache)
        sp = Wire(groups.sp, Ledger())
        runner = make_runner(config, groups, forward, context, cache, sp, kernels)
        recorded = record_graphs(runner, config, forward.model, groups)
        run_dry(dry, runner, cache, forward, config.schedule.max_num_seqs)
        runner.forget_recorded()
        return recorded

    gather_objects(None, groups.engine)  # What NCCL keeps for these is taken before anything is measured.
    return measured_cache(config, forward.model, groups.world, run)


def compare_ranks(config: EngineConfig) -> None:
    """Raises RuntimeError, on every rank, naming the first rank that differs from rank 0. Collective.

    Compares every setting, the model's shape and weights, and the versions of what computes.
    """
    mine = _fingerprint(config)
    everybody = gather_objects(mine, world_axis())
    for rank, other in enumerate(everybody):
        for name, value in other.items():
            if value != everybody[0].get(name):
                leave_together()
                raise mark_shared(
                    RuntimeError(
                        f"rank {rank} has {name}={value!r} but rank 0 has {everybody[0].get(name)!r}; start "
                        "every rank with the same flags, checkpoint and installed versions"
                    )
                )


def _fingerprint(config: EngineConfig) -> dict[str, Any]:
    found: dict[str, Any] = {f.name: getattr(config, f.name) for f in fields(config)}
    del found[
        "checkpoint"
    ]  # A folder may be mounted elsewhere on another host; what counts is what it holds.
    try:
        manifest = read_manifest(config.checkpoint)
        found["model"], found["weights"] = asdict(manifest.model), manifest.content_id
    except (ValueError, OSError) as error:
        found["checkpoint"] = str(error)
    for package in ("megatron_sps2", "torch", "numba", "megatron-core"):
        try:
            found[f"{package} version"] = version(package)
        except PackageNotFoundError:
            found[f"{package} version"] = None
    return found
