"""`sps2 serve`: the ranks, and beside them the HTTP front end in a process of its own.

Without a launcher this process only watches: it starts both, passes SIGTERM on to the front end, and ends the
rest when one of them fails. Under a launcher rank 0 starts the front end. By --role either can be alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import secrets
import signal
import sys
import tempfile
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from megatron_sps2.cli import front_end
from megatron_sps2.cli.generate import check_engine_flags, engine_config
from megatron_sps2.cli.layout import settle_layout
from megatron_sps2.cli.serve_arguments import api_keys, check_limits, schedule_config
from megatron_sps2.cli.world import in_local_world, in_world
from megatron_sps2.config import CacheConfig, ModelConfig
from megatron_sps2.engine.engine_config import EngineConfig
from megatron_sps2.engine.rank_memory import kv_layer_bytes
from megatron_sps2.model.manifest import load_model_config
from megatron_sps2.parallel import garbage
from megatron_sps2.parallel.network import address_of, is_loopback
from megatron_sps2.parallel.rank_env import LOOPBACK, RankEnv
from megatron_sps2.server.beats import tell_lost
from megatron_sps2.server.protocol import Endpoints

if TYPE_CHECKING:
    from megatron_sps2.engine.engine import Engine

DEFAULT_CACHE_GIB = 2.0


def run(args: argparse.Namespace) -> int:
    run_role = {"all": _run_all, "front-end": _run_front_end, "engine": _run_engine}[args.role]
    return run_role(args)


def _run_all(args: argparse.Namespace) -> int:
    if RankEnv.detect() is not None:
        return in_world(args, _serve_launched, check_serve)
    settle_layout(args)
    check_serve(args)
    with tempfile.TemporaryDirectory(prefix="sps2-") as folder:
        args.endpoints = front_end.endpoints_in(folder)
        config = front_end.front_end_config(args, args.endpoints, outlives_engine=args.max_restarts > 0)
        return in_local_world(
            args, serve_rank, companion=front_end.companion(config), max_restarts=args.max_restarts
        )


def _run_front_end(args: argparse.Namespace) -> int:
    """Without ranks; engines come, and may go and come again, at --engine-address."""
    check_serve(args)
    endpoints = front_end.endpoints_at(args.engine_address)
    return front_end.run_here(front_end.front_end_config(args, endpoints, outlives_engine=True))


def _run_engine(args: argparse.Namespace) -> int:
    """Ranks for a front end elsewhere."""
    check_limits(args)
    args.endpoints = front_end.endpoints_at(args.engine_address)
    if RankEnv.detect() is not None:
        return in_world(args, serve_rank, check_serve)
    settle_layout(args)
    check_serve(args)
    return in_local_world(args, serve_rank, max_restarts=args.max_restarts)


def check_serve(args: argparse.Namespace) -> None:
    """Raises ValueError or OSError for what is wrong before a rank has to work."""
    check_limits(args)
    check_engine_flags(args)
    api_keys(args)
    _serve_config(args)


def _serve_config(args: argparse.Namespace) -> EngineConfig:
    """What every rank is told."""
    model = load_model_config(args.checkpoint)
    config = engine_config(args, args.max_model_len or model.max_seq_len)
    config = dataclasses.replace(config, schedule=schedule_config(args))
    # A rank knows its device; before that `auto` stands there, and what is measured cannot be checked.
    if args.device.startswith("cuda") and args.num_kv_blocks is None and args.kv_cache_gib is None:
        return dataclasses.replace(config, gpu_memory_utilization=args.gpu_memory_utilization)
    return dataclasses.replace(config, cache=_cache_config(args, config, model))


def _cache_config(args: argparse.Namespace, config: EngineConfig, model: ModelConfig) -> CacheConfig:
    """Raises ValueError for a cache in which not even one request of --max-model-len fits."""
    fewest = config.fewest_blocks
    layer_bytes = kv_layer_bytes(model, args.tp, args.dtype, args.kv_cache_dtype)
    block_bytes = model.num_layers * layer_bytes * args.block_size
    if args.num_kv_blocks is not None:
        num_blocks = args.num_kv_blocks
    elif args.kv_cache_gib is not None:
        num_blocks = int(args.kv_cache_gib * 2**30 / block_bytes)
    else:
        wanted = fewest * args.max_num_seqs
        num_blocks = max(fewest, min(wanted, int(DEFAULT_CACHE_GIB * 2**30 / block_bytes)))
    if num_blocks < fewest:
        raise ValueError(
            f"a KV cache of {num_blocks} blocks a rank is too small for a request of {config.max_model_len} "
            f"tokens, which needs {fewest} ({fewest * block_bytes / 2**30:.2f} GiB); raise --kv-cache-gib or "
            "lower --max-model-len"
        )
    return CacheConfig(num_blocks=num_blocks, block_size=args.block_size)


def serve_rank(args: argparse.Namespace) -> int:
    """On every rank; ends when the front end says so."""
    from megatron_sps2.engine.build import build_engine
    from megatron_sps2.engine.start_up import in_words
    from megatron_sps2.parallel.collectives import from_first_rank
    from megatron_sps2.parallel.trace import Trace
    from megatron_sps2.server.pulse import Pulse

    rank, world = 0, from_first_rank(lambda: 1 + secrets.randbits(62))
    args.heart.when_lost(lambda message: tell_lost(args.endpoints.beats, message, world))
    try:
        engine = build_engine(_serve_config(args))
        args.heart.watch(engine.ledger.activity, group=engine.ranks[0])
        rank = engine.place.rank
        if rank == 0:
            took = in_words(engine.start_up)
            kept = f"room for {engine.blocks.capacity:,} tokens in the KV cache of a replica"
            print(f"loaded {args.checkpoint} in {took}; {kept}", file=sys.stderr, flush=True)
        engine.ledger.trace = Trace() if args.trace else None
        garbage.leave_aside()
        with Pulse(engine, args.endpoints.beats, world):
            _follow_or_lead(args, engine, world)
    except Exception as error:
        named = args.heart.named(error)
        message = str(named) if named is not error else f"rank {rank}: {error}"
        tell_lost(args.endpoints.beats, message, world)
        raise named from (error if named is not error else error.__cause__)
    _write_trace(args, engine)
    return 0


def _follow_or_lead(args: argparse.Namespace, engine: Engine, world: int) -> None:
    from megatron_sps2.server.leader import Leader

    if not engine.is_leader:
        engine.follow()
        return
    leader = Leader(
        engine,
        args.endpoints.engine,
        world=world,
        # Other ranks wait in a collective meanwhile; well within its time limit they hear something.
        idle_step_s=min(30.0, args.timeout_s / 3),
        max_num_seqs=args.max_num_seqs,
        policy=args.policy,
    )
    leader.run()


def _write_trace(args: argparse.Namespace, engine: Engine) -> None:
    """All ranks' events into one file, by world rank 0."""
    from megatron_sps2.parallel.collectives import gather_objects
    from megatron_sps2.parallel.groups import world_axis
    from megatron_sps2.parallel.trace import write_trace

    trace = engine.ledger.trace
    if trace is None:
        return
    events = gather_objects(trace.events, world_axis())
    if engine.place.rank == 0:
        write_trace(args.trace, events)


# Under a launcher.


def _serve_launched(args: argparse.Namespace) -> int:
    """On every rank of a launcher's world; rank 0 starts the front end, or finds that of its last life."""
    from megatron_sps2.parallel.collectives import from_first_rank, gather_objects
    from megatron_sps2.parallel.groups import world_axis

    env = RankEnv.detect()
    assert env is not None, "started by a launcher"
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # The launcher sends it to all; rank 0 drains for them.
    host = urlsplit(env.init_method).hostname or LOOPBACK[0]
    beside: front_end.Detached | None = None

    def start() -> Endpoints:
        nonlocal beside  # rank 0's alone
        beside = front_end.start_or_find(args, choose, lambda: bool(args.heart.loss))
        return beside.endpoints

    def choose(folder: str) -> Endpoints:
        if env.local_world_size == env.world_size:
            return front_end.endpoints_in(folder)
        # Rank 0's own name may be a loopback address to itself; to the others it is not.
        outside = [each for each in addresses if not is_loopback(each)]
        return front_end.endpoints_of([*outside, *addresses][0])

    addresses = gather_objects(address_of(host), world_axis())
    args.endpoints = from_first_rank(start)
    code = serve_rank(args)
    return code or (beside.await_end() if beside else 0)
