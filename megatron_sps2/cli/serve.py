"""`sps2 serve`: the ranks, and beside them the HTTP front end in a process of its own.

Without a launcher this process only watches: it starts both, passes SIGTERM on to the front end, and ends the
rest when one of them fails. Under a launcher rank 0 starts the front end.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import os
import signal
import socket
import sys
import tempfile
import threading
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from megatron_sps2.cli.generate import check_engine_flags, engine_config
from megatron_sps2.cli.layout import settle_layout
from megatron_sps2.cli.process import RUN_ERROR, report, set_logging
from megatron_sps2.cli.serve_arguments import api_keys, check_limits, schedule_config
from megatron_sps2.cli.world import in_local_world, in_world
from megatron_sps2.config import CacheConfig
from megatron_sps2.engine.engine_config import EngineConfig
from megatron_sps2.model.manifest import load_model_config
from megatron_sps2.parallel.local_world import Companion
from megatron_sps2.parallel.rank_env import RankEnv
from megatron_sps2.server.beats import tell_lost
from megatron_sps2.server.front_end_config import FrontEndConfig
from megatron_sps2.server.protocol import Endpoints

if TYPE_CHECKING:
    from megatron_sps2.engine.engine import Engine

DEFAULT_CACHE_GIB = 2.0
FRONT_END_GRACE_S = 10.0


def run(args: argparse.Namespace) -> int:
    env = RankEnv.detect()
    if env is not None:
        return in_world(args, _serve_launched, check_serve)
    settle_layout(args)
    check_serve(args)
    with tempfile.TemporaryDirectory(prefix="sps2-") as folder:
        args.endpoints = endpoints_here(folder)
        return in_local_world(args, serve_rank, _companion(args))


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
    return dataclasses.replace(config, cache=_cache_config(args, config))


def _cache_config(args: argparse.Namespace, config: EngineConfig) -> CacheConfig:
    """Raises ValueError for a cache in which not even one request of --max-model-len fits."""
    one = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, max_num_seqs=1))
    fewest = one.sized_cache().num_blocks + 1  # chunks may end in the middle of a block
    model = load_model_config(args.checkpoint)
    size = {"float32": 4}.get(args.dtype, 2)
    block_bytes = 2 * model.num_layers * model.num_query_groups * model.head_dim * size * args.block_size
    block_bytes //= args.tp
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


def endpoints_here(folder: str) -> Endpoints:
    return Endpoints(engine=f"ipc://{folder}/engine", beats=f"ipc://{folder}/beats")


def _front_end_config(args: argparse.Namespace, world_size: int) -> FrontEndConfig:
    return FrontEndConfig(
        host=args.host,
        port=args.port,
        port_file=args.port_file,
        endpoints=args.endpoints,
        checkpoint=args.checkpoint,
        served_model_name=args.served_model_name or Path(args.checkpoint).resolve().name,
        api_keys=api_keys(args),
        num_replicas=args.dp,
        world_size=world_size,
        max_queue=args.max_queue,
        max_body_bytes=int(args.max_body_mib * 2**20),
        request_timeout_s=args.request_timeout_s,
        drain_timeout_s=args.drain_timeout_s,
        heartbeat_timeout_s=args.heartbeat_timeout_s,
        log_level=args.log_level,
    )


def _companion(args: argparse.Namespace) -> Companion:
    config = _front_end_config(args, args.dp * args.sp * args.tp)
    return Companion(
        name="front end",
        target=_front_end_main,
        args=(config,),
        on_failure=lambda message: tell_lost(config.endpoints.beats, message),
    )


def _front_end_main(config: FrontEndConfig) -> int:
    """The front end's process -> its exit code."""
    from megatron_sps2.server.front_end import run as run_front_end

    set_logging(config.log_level)
    try:
        return run_front_end(config)
    except Exception as error:  # The outermost loop of this process.
        return report(error)


def serve_rank(args: argparse.Namespace) -> int:
    """On every rank; ends when the front end says so."""
    from megatron_sps2.engine.build import build_engine
    from megatron_sps2.engine.start_up import in_words
    from megatron_sps2.parallel.trace import Trace
    from megatron_sps2.server.pulse import Pulse

    rank = 0
    args.heart.when_lost(lambda message: tell_lost(args.endpoints.beats, message))
    try:
        engine = build_engine(_serve_config(args))
        args.heart.watch(engine.ledger.activity)
        rank = engine.place.rank
        if rank == 0:
            took = in_words(engine.start_up)
            print(f"loaded {args.checkpoint} in {took}", file=sys.stderr, flush=True)
        engine.ledger.trace = Trace() if args.trace else None
        with Pulse(engine, args.endpoints.beats):
            _follow_or_lead(args, engine)
    except Exception as error:
        named = args.heart.named(error)
        tell_lost(args.endpoints.beats, str(named) if named is not error else f"rank {rank}: {error}")
        raise named from error
    _write_trace(args, engine)
    return 0


def _follow_or_lead(args: argparse.Namespace, engine: Engine) -> None:
    from megatron_sps2.server.leader import Leader

    if not engine.is_leader:
        engine.follow()
        return
    leader = Leader(
        engine,
        args.endpoints.engine,
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
    """On every rank of a launcher's world; rank 0 starts the front end."""
    from megatron_sps2.parallel.collectives import from_first_rank

    env = RankEnv.detect()
    assert env is not None, "started by a launcher"
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # The launcher sends it to all; rank 0 drains for them.
    with tempfile.TemporaryDirectory(prefix="sps2-") as folder:
        one_host = env.local_world_size == env.world_size
        args.endpoints = from_first_rank(lambda: endpoints_here(folder) if one_host else _endpoints_tcp())
        front_end = _start_front_end(args, env.world_size) if env.rank == 0 else None
        code = serve_rank(args)
        if front_end:
            front_end.join(FRONT_END_GRACE_S)
            code = code or front_end.exitcode or 0
    return code


def _endpoints_tcp() -> Endpoints:
    """Free ports of this host, under the name by which the other hosts reach it."""
    host = socket.gethostname()
    with socket.socket() as first, socket.socket() as second:
        ports = []
        for probe in (first, second):
            probe.bind(("", 0))
            ports.append(probe.getsockname()[1])
    return Endpoints(engine=f"tcp://{host}:{ports[0]}", beats=f"tcp://{host}:{ports[1]}")


def _start_front_end(args: argparse.Namespace, world_size: int) -> BaseProcess:
    config = _front_end_config(args, world_size)
    process = multiprocessing.get_context("spawn").Process(
        target=_front_end_process, args=(config,), name="front end"
    )
    process.start()

    def drain(signum: int, frame: FrameType | None) -> None:
        os.kill(process.pid or 0, signal.SIGTERM)

    signal.signal(signal.SIGTERM, drain)
    signal.signal(signal.SIGINT, drain)
    threading.Thread(target=_end_with, args=(process,), name="front end watch", daemon=True).start()
    return process


def _front_end_process(config: FrontEndConfig) -> None:
    sys.exit(_front_end_main(config))


def _end_with(front_end: BaseProcess) -> None:
    """A front end that fails has found this world broken: this rank may be waiting in it for ever."""
    front_end.join()
    if front_end.exitcode:
        os._exit(RUN_ERROR)
