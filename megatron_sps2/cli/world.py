"""Starts the world a command runs in: the launcher's, or ranks of our own on this host.

Knows environments and processes; what the ranks do is the command's.
"""

from __future__ import annotations

import argparse
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from urllib.parse import urlsplit

from megatron_sps2.cli.arguments import parallel_config
from megatron_sps2.cli.device import pick_backend, pick_device
from megatron_sps2.cli.launch_arguments import check_launch
from megatron_sps2.cli.layout import settle_layout
from megatron_sps2.cli.process import RUN_ERROR, USER_ERROR, report, set_logging
from megatron_sps2.parallel.hello import Hello, own_hello
from megatron_sps2.parallel.host import CAN_BIND, bind
from megatron_sps2.parallel.local_world import Companion, run_local_world
from megatron_sps2.parallel.network import card_towards
from megatron_sps2.parallel.nodes import check_tp_inside_nodes, num_threads, own_cores
from megatron_sps2.parallel.rank_env import (
    RankEnv,
    init_process_group,
    limit_shape_caches,
)
from megatron_sps2.parallel.rendezvous import meet, open_store

# A rank that hears of another's end may hear it from its collective too, and then ends by itself.
WAKE_S = 2.0
LEAVE_S = 10.0
NAME_WAIT_S = 0.5
PRELOAD = ("megatron_sps2.cli.preload",)
Body = Callable[[argparse.Namespace], int]
Check = Callable[[argparse.Namespace], None]


def in_world(args: argparse.Namespace, body: Body, check: Check, explained: int = USER_ERROR) -> int:
    """Runs `body(args)` on every rank of an initialised torch.distributed world -> exit code.

    Under a launcher this process is one of the ranks; without one, sp x tp local ranks are started.
    `check(args)` raises for what is wrong before a rank has to work; it fails on all ranks or on none.
    `explained` is the exit code of a local rank that needs no line to say so.
    """
    check_launch(args)
    env = RankEnv.detect()
    if env is not None:
        # Before any thread is started, as all of them must leave it to the one that waits for it.
        if getattr(args, "role", None) != "all":  # that one drains
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            threading.Thread(target=_await_sigterm, args=(args,), name="SIGTERM", daemon=True).start()
        return _run_rank(args, body, env, check)
    settle_layout(args)
    check(args)
    if parallel_config(args).world_size == 1:
        return _run_rank(args, body, RankEnv.alone())
    return in_local_world(args, body, explained=explained)


def in_local_world(
    args: argparse.Namespace,
    body: Body,
    companion: Companion | None = None,
    explained: int = USER_ERROR,
    max_restarts: int = 0,
) -> int:
    """Starts dp x sp x tp ranks on this host, and a process beside them -> exit code."""
    world_size = parallel_config(args).world_size
    return run_local_world(
        world_size,
        _rank_main,
        (args, body),
        preload=PRELOAD,
        explained=explained,
        companion=companion,
        max_restarts=max_restarts,
    )


def _rank_main(args: argparse.Namespace, body: Body) -> int:
    """A local rank, in a process of its own."""
    set_logging(args.log_level)
    try:
        env = RankEnv.detect()
        assert env is not None, "a local rank was started without its environment"
        return _run_rank(args, body, env)
    except Exception as error:  # The outermost loop of this process.
        return report(error)


def _run_rank(args: argparse.Namespace, body: Body, env: RankEnv, check: Check | None = None) -> int:
    """This rank's whole life; `args.heart` is its heartbeat. Raises what ended it, or names who was lost."""
    limit_shape_caches(os.environ)
    import torch.distributed as dist

    from megatron_sps2.parallel.collectives import agree
    from megatron_sps2.parallel.heartbeat import Heartbeat

    store = open_store(env, args.rendezvous_timeout_s)
    hellos = meet(env, store, own_hello(env), args.rendezvous_timeout_s)
    with Heartbeat(
        env,
        store,
        hellos,
        start_s=args.rendezvous_timeout_s,
        silent_s=args.heartbeat_timeout_s,
        on_lost=lambda message: _end(args, env, message),
    ) as args.heart:
        try:
            args.device = pick_device(args.device, env, args.backend)
            args.backend = pick_backend(args.backend, args.device)
            _settle_cores(args, hellos[env.rank], hellos)
            _settle_card(env, hellos)
            init_process_group(env, args.backend, timedelta(seconds=args.timeout_s), store)
            settle_layout(args, env)
            if check:
                agree(functools.partial(_check, args, env, hellos, check))
            code = body(args)
            dist.destroy_process_group()
        except Exception as error:
            named = args.heart.named(error)
            raise named from (error if named is not error else error.__cause__)
    return code


def _check(args: argparse.Namespace, env: RankEnv, hellos: Sequence[Hello], check: Check) -> None:
    parallel = parallel_config(args)
    env.check_world(parallel)
    if not args.allow_tp_across_nodes:
        check_tp_inside_nodes(parallel, hellos)
    check(args)


def _settle_cores(args: argparse.Namespace, mine: Hello, hellos: Sequence[Hello]) -> None:
    """This rank's own cores, and as many threads as it has of them."""
    import torch

    cores = own_cores(mine, hellos) if args.bind_cores and CAN_BIND else None
    args.all_cores = mine.cores  # of before, for a process that this one starts
    if cores:
        bind(cores)
    if args.device == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(num_threads(mine, hellos))


def _settle_card(env: RankEnv, hellos: Sequence[Hello]) -> None:
    """Between hosts, the network card that leads to rank 0's; what the user has chosen stays."""
    host = urlsplit(env.init_method).hostname
    if host and len({each.node for each in hellos}) > 1 and "GLOO_SOCKET_IFNAME" not in os.environ:
        card = card_towards(host)
        if card:
            os.environ["GLOO_SOCKET_IFNAME"] = card


def _end(args: argparse.Namespace, env: RankEnv, message: str) -> None:
    """Another rank was lost; this one may be waiting for it where nothing can wake it.

    Said at once, since a launcher may end this rank next; our own supervisor names the lost one itself.
    """
    if env.launcher != "local":
        _say_lost(args, message)
    time.sleep(WAKE_S)
    if args.heart.is_leaving:
        time.sleep(LEAVE_S)
    elif not args.heart.has_told:
        _say_lost(args, message)
    os._exit(RUN_ERROR)


def _await_sigterm(args: argparse.Namespace) -> None:
    """A launcher ends the ranks that are left when one has died: its name first, which may come later."""
    signal.sigwait({signal.SIGTERM})
    heart = getattr(args, "heart", None)
    if heart and heart.await_loss(NAME_WAIT_S) and not heart.has_told:
        _say_lost(args, heart.loss)
    os._exit(128 + signal.SIGTERM)


def _say_lost(args: argparse.Namespace, message: str) -> None:
    args.heart.has_told = True
    report(RuntimeError(message))
