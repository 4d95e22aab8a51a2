"""All ranks of a world find each other, or each says within a stated time why not.

Before torch.distributed's own groups, whose time-outs name nobody. Knows stores, not collectives.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from megatron_sps2.parallel.hello import Hello, find_difference
from megatron_sps2.parallel.rank_env import RankEnv
from megatron_sps2.parallel.shared_error import mark_shared

if TYPE_CHECKING:
    from torch.distributed import Store

logger = logging.getLogger(__name__)

POLL_S = 0.05
# Rank 0 says who is still missing this often.
TELL_S = 15.0
# Others wait for rank 0's verdict a little longer than it waits for them.
GRACE_S = 5.0
READ_S = 2.0
VERDICT, READ = "sps2/verdict", "sps2/read"


def open_store(env: RankEnv, timeout_s: float) -> Store:
    """The store at `env.init_method`; rank 0 keeps it, or torchrun's agent does.

    Raises RuntimeError for a port that is taken, or an address where nobody answers within `timeout_s`.
    """
    import torch.distributed as dist

    if env.world_size == 1:
        return dist.HashStore()
    address = urlsplit(env.init_method)
    if address.scheme == "file":
        return dist.FileStore(address.path, env.world_size)
    host, port = address.hostname, address.port
    assert host and port, env.init_method
    agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_keeper = env.rank == 0 and not agents
    if not is_keeper:
        _knock(host, port, timeout_s)
    store = _within(timeout_s, env, lambda: _tcp_store(host, port, is_keeper, timeout_s))
    # A restarted group must not read what the one before it wrote.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"sps2/attempt_{attempt}", store) if agents else store


def _tcp_store(host: str, port: int, is_keeper: bool, timeout_s: float) -> Store:
    import torch.distributed as dist

    limit = timedelta(seconds=timeout_s)
    try:
        return dist.TCPStore(host, port, None, is_keeper, timeout=limit, wait_for_workers=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if "EADDRINUSE" in reason:
            reason = f"port {port} is taken on {socket.gethostname()}; choose another MASTER_PORT"
        elif is_keeper:
            reason = f"rank 0 cannot listen at {host}:{port} ({reason}); use an address of its own host"
        raise RuntimeError(reason) from error


def _knock(host: str, port: int, timeout_s: float) -> None:
    """Waits until somebody listens there; torch's own wait fills the log, and does not say for whom."""
    end, reason = time.monotonic() + timeout_s, ""
    while time.monotonic() < end:
        try:
            socket.create_connection((host, port), timeout=max(1.0, timeout_s / 4)).close()
            return
        except OSError as error:
            reason = error.strerror or str(error)
        time.sleep(4 * POLL_S)
    raise RuntimeError(
        f"rank 0 does not answer at {host}:{port} within {timeout_s:g} s ({reason}); is it started, and may "
        f"{socket.gethostname()} reach that port?"
    )


def _within(timeout_s: float, env: RankEnv, make: Callable[[], Store]) -> Store:
    """`make()`, in a thread: a listener that is no store would keep torch waiting for ever."""
    found: list[Store | Exception] = []

    def run() -> None:
        try:
            found.append(make())
        except RuntimeError as error:
            found.append(error)

    thread = threading.Thread(target=run, name="rendezvous", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not found:
        address = env.init_method.removeprefix("tcp://")
        raise RuntimeError(
            f"what listens at {address} is not rank 0 of this job: no answer within {timeout_s:g} s; choose "
            "another MASTER_PORT"
        )
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def meet(env: RankEnv, store: Store, hello: Hello, timeout_s: float) -> list[Hello]:
    """Every rank's Hello, in order of rank, on every rank. Collective.

    Raises RuntimeError on all ranks where one is absent for `timeout_s` after rank 0 has come, or differs in
    its world size, job or versions; marked as shared, so that rank 0 speaks for all. A second process that
    claims a place raises for itself.
    """
    if env.world_size == 1:
        return [hello]
    earlier = store.add(_count_key(env.rank), 1) - 1
    if earlier:
        first = Hello.decode(store.get(_hello_key(env.rank)))
        raise RuntimeError(
            f"rank {env.rank} is taken: {hello.name} came to {env.init_method} after {first.name}; two jobs "
            "meet there: give each its own MASTER_PORT"
        )
    store.set(_hello_key(env.rank), hello.encode())
    if env.rank == 0:
        problem, hellos = _receive(store, hello, timeout_s)
        store.set(VERDICT, json.dumps({"problem": problem, "hellos": [each.encode() for each in hellos]}))
        if problem:  # The store ends with this process: not before those who are here have read it.
            _wait_until(lambda: store.add(READ, 0) >= _num_here(store, env.world_size) - 1, READ_S)
    else:
        problem, hellos = _await_verdict(store, hello, timeout_s)
    if problem:
        raise mark_shared(RuntimeError(problem))
    return hellos


def _receive(store: Store, mine: Hello, timeout_s: float) -> tuple[str | None, list[Hello]]:
    """On rank 0: (what is wrong, everybody)."""
    hellos: dict[int, Hello] = {0: mine}
    end, tell_at = time.monotonic() + timeout_s, time.monotonic() + TELL_S
    while True:
        for rank in [rank for rank in range(mine.world_size) if rank not in hellos]:
            if store.check([_hello_key(rank)]):
                hellos[rank] = Hello.decode(store.get(_hello_key(rank)))
                if problem := find_difference(mine, hellos[rank]):
                    return problem, []
        if len(hellos) == mine.world_size:
            return None, [hellos[rank] for rank in range(mine.world_size)]
        now = time.monotonic()
        if now > end:
            return _absent(hellos, mine.world_size, timeout_s), []
        if now > tell_at:
            tell_at = now + TELL_S
            logger.warning("waiting for %s; here: %s", _missing(hellos, mine.world_size), _by_host(hellos))
        time.sleep(POLL_S)


def _absent(hellos: Mapping[int, Hello], world_size: int, timeout_s: float) -> str:
    return (
        f"{_missing(hellos, world_size)} of {world_size} did not come within {timeout_s:g} s; here: "
        f"{_by_host(hellos)}; start the missing ones, or raise --rendezvous-timeout-s"
    )


def _missing(hellos: Mapping[int, Hello], world_size: int) -> str:
    absent = [str(rank) for rank in range(world_size) if rank not in hellos]
    shown = ", ".join(absent[:8]) + (f" and {len(absent) - 8} more" if len(absent) > 8 else "")
    return f"{'rank' if len(absent) == 1 else 'ranks'} {shown}"


def _by_host(hellos: Mapping[int, Hello]) -> str:
    hosts: dict[str, list[str]] = {}
    for rank, hello in sorted(hellos.items()):
        hosts.setdefault(hello.host, []).append(str(rank))
    return "; ".join(f"{host}: {', '.join(ranks)}" for host, ranks in hosts.items())


def _await_verdict(store: Store, mine: Hello, timeout_s: float) -> tuple[str | None, list[Hello]]:
    """On the others. Raises RuntimeError where rank 0 does not come, or decided for another world."""
    try:
        verdict = _read_verdict(store, timeout_s + GRACE_S)
    except RuntimeError as error:  # of a store that has gone
        raise RuntimeError(
            f"rank 0 ended while {mine.name} waited for all ranks to come; see what rank 0's log says"
        ) from error
    if isinstance(verdict, str):
        raise RuntimeError(f"{verdict}; {mine.name} waited for it: see what rank 0's log says")
    hellos = [Hello.decode(text) for text in verdict["hellos"]]
    if not verdict["problem"] and mine.world_size != len(hellos):
        raise RuntimeError(
            f"{mine.name} was started for world_size={mine.world_size} and came to a world of {len(hellos)}; "
            "start all ranks with the same number of nodes and ranks a node"
        )
    return verdict["problem"], hellos


def _read_verdict(store: Store, limit_s: float) -> Any:
    """What rank 0 has decided, or in words why it has not. It has `limit_s` from when it comes."""
    if not _wait_until(lambda: store.check([_hello_key(0)]), limit_s):
        return f"rank 0 did not come within {limit_s:g} s"
    if not _wait_until(lambda: store.check([VERDICT]), limit_s):
        return f"rank 0 came and has been silent for {limit_s:g} s"
    verdict = json.loads(store.get(VERDICT))
    store.add(READ, 1)
    return verdict


def _num_here(store: Store, world_size: int) -> int:
    return sum(store.check([_hello_key(rank)]) for rank in range(world_size))


def _wait_until(reached: Callable[[], bool], seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not reached():
        if time.monotonic() > end:
            return False
        time.sleep(POLL_S)
    return True


def _count_key(rank: int) -> str:
    return f"sps2/count/{rank}"


def _hello_key(rank: int) -> str:
    return f"sps2/hello/{rank}"
