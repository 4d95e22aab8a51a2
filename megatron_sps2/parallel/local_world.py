"""A world of ranks on this host without a launcher: start them, watch them, end them together.

The parent stays light (no torch); a forkserver imports torch once for all ranks. Knows processes and signals,
not what the ranks do. RankEnv.detect reads the variables that are set here.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import connection, process, reduction
from types import FrameType
from typing import Any

from megatron_sps2.parallel.rank_env import limit_shape_caches, threads_per_rank

Process = process.BaseProcess
Target = Callable[..., object]
# Imported once, before the ranks are forked from it: they then start in 0.3 s instead of 10 s.
PRELOAD = ("torch.distributed",)
PR_SET_PDEATHSIG = 1  # prctl(2)


class _Ended(BaseException):
    """A signal asked the supervisor to end; a BaseException, so that nothing on the way swallows it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class _Stdin:
    """The parent's stdin on its way to a rank: pickled there, it arrives as the rank's own descriptor."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __reduce__(self) -> tuple[Callable[[Any], int], tuple[Any]]:
        return _detach, (reduction.DupFd(self.fd),)


def _detach(handle: Any) -> int:
    return int(handle.detach())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Start:
    """What a rank needs before its target runs."""

    environ: dict[str, str]
    stdin: _Stdin | int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Companion:
    """A process beside the ranks, with the name that messages give it; it ends with them.

    It gets SIGTERM in their stead, twice at most, and is expected to end the ranks in its own way.
    `on_failure` is told one line when one of the ranks has failed, and `grace_s` begins.
    """

    name: str
    target: Target
    args: Sequence[object]
    on_failure: Callable[[str], None]


MAX_SIGNALS_PASSED_ON = 2
# Of ranks, after the companion has ended.
LAST_S = 120.0


def run_local_world(
    world_size: int,
    target: Target,
    args: Sequence[object] = (),
    *,
    preload: Sequence[str] = PRELOAD,
    grace_s: float = 5.0,
    explained: int | None = None,
    companion: Companion | None = None,
    max_restarts: int = 0,
) -> int:
    """Runs `target(*args)` in `world_size` ranks of this host and waits for all; 0 when every one ended well.

    `target` is an importable top-level function; an int that it returns is its rank's exit code. If one rank
    fails, a line on stderr names it, the others have `grace_s` seconds to end by themselves, and its exit
    code (128 + signal number for a signal) is returned. Ctrl-C and SIGTERM end all ranks, or go to the
    companion. By exit code `explained` a process says that the user has been told all there is: no line is
    added. After any other failure of a rank all ranks are started again, up to `max_restarts` times; the
    companion stays.
    """
    if world_size < 1:
        raise ValueError(f"world_size={world_size} must be at least 1; it is dp x sp x tp")
    family, passing_on = _Family(), _PassingOn()
    with tempfile.TemporaryDirectory(prefix="sps2-") as folder, _signals(passing_on) as active:
        try:
            for attempt in itertools.count():
                method = f"file://{folder}/store{attempt}"
                _start_ranks(family.ranks, world_size, target, args, preload, method)
                if companion and not family.companion:
                    family.companion = passing_on.companion = _start_companion(world_size, companion)
                code = _watch(family, explained, companion.on_failure if companion else None)
                if code in (0, explained) or attempt == max_restarts or family.companion_has_ended:
                    return code
                _stop(family.ranks, grace_s)
                family.ranks.clear()
                _say(f"starting the ranks again ({attempt + 1} of {max_restarts})")
            raise AssertionError("counts for ever")
        except _Ended as ended:
            grace_s = 0.0
            return 128 + ended.signum
        finally:
            with _signals(signal.SIG_IGN, active):
                _stop(family.all, grace_s)


@dataclass(slots=True)
class _Family:
    """The processes that were started; the companion comes after the ranks."""

    ranks: list[Process] = field(default_factory=list)
    companion: Process | None = None

    @property
    def all(self) -> list[Process]:
        return [*self.ranks, *([self.companion] if self.companion else [])]

    @property
    def companion_has_ended(self) -> bool:
        return self.companion is not None and self.companion.exitcode is not None


class _PassingOn:
    """A signal handler: to the companion, which ends the ranks in its own way; else the supervisor ends."""

    def __init__(self) -> None:
        self.companion: Process | None = None
        self._num_passed = 0

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.companion is None or self._num_passed == MAX_SIGNALS_PASSED_ON:
            raise _Ended(signum)
        self._num_passed += 1
        # Not Process.terminate(): this may interrupt its own methods.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.companion.pid or 0, signal.SIGTERM)


def _start_companion(world_size: int, companion: Companion) -> Process:
    start = _Start(environ=_shared_environ(world_size), stdin=None)
    context = multiprocessing.get_context("forkserver")
    child = context.Process(target=_run_companion, args=(start, companion.target, tuple(companion.args)))
    child.name = companion.name
    child.start()
    return child


def _run_companion(start: _Start, target: Target, args: tuple[object, ...]) -> None:
    os.setsid()  # The terminal's Ctrl-C reaches it as the supervisor's SIGTERM, once.
    _run_rank(start, target, args)


@contextmanager
def _signals(
    handler: Callable[[int, FrameType | None], Any] | signal.Handlers, active: bool = True
) -> Iterator[bool]:
    """`handler` for the signals that end a program; yields whether it is set (the main thread alone can)."""
    if not active or threading.current_thread() is not threading.main_thread():
        yield False
        return
    before = {
        signum: signal.signal(signum, handler) for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield True
    finally:
        for signum, old in before.items():
            signal.signal(signum, old)


def _start_ranks(
    ranks: list[Process],
    world_size: int,
    target: Target,
    args: Sequence[object],
    preload: Sequence[str],
    method: str,
) -> None:
    """Appends each rank to `ranks` as it is started, so that a failure half way leaves none behind."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    shared = _shared_environ(world_size)
    with _environ(shared):  # OpenMP reads its variable when the forkserver imports torch
        for rank in range(world_size):
            environ = {
                **shared,
                "SPS2_RANK": str(rank),
                "SPS2_WORLD_SIZE": str(world_size),
                "SPS2_INIT_METHOD": method,
            }
            start = _Start(environ=environ, stdin=_own_stdin() if rank == 0 else None)
            child = context.Process(target=_run_rank, args=(start, target, tuple(args)), name=f"rank {rank}")
            ranks.append(child)
            child.start()


def _shared_environ(world_size: int) -> dict[str, str]:
    """Variables for all ranks; what the user has set stays."""
    loopback = "lo" if sys.platform == "linux" else "lo0"
    chosen = {"OMP_NUM_THREADS": str(threads_per_rank(world_size)), "GLOO_SOCKET_IFNAME": loopback}
    limit_shape_caches(chosen)
    return {name: os.environ.get(name, value) for name, value in chosen.items()}


@contextmanager
def _environ(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, old in before.items():
            os.environ.pop(name) if old is None else os.environ.update({name: old})


def _own_stdin() -> _Stdin | None:
    try:
        os.fstat(0)
    except OSError:  # closed, as under some job runners
        return None
    return _Stdin(0)


def _run_rank(start: _Start, target: Target, args: tuple[object, ...]) -> None:
    """The whole life of a rank, in its own process."""
    _end_with_parent()
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # the terminal sends Ctrl-C to all; the parent ends the ranks
    os.environ.update(start.environ)
    if isinstance(start.stdin, int):
        os.dup2(start.stdin, 0)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - lives as long as the process
    _limit_threads(start.environ["OMP_NUM_THREADS"])
    result = target(*args)
    sys.exit(result if isinstance(result, int) else 0)


def _end_with_parent() -> None:
    """No orphans: this rank dies when the forkserver or the supervisor does, however that was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_await_parent, name="parent watch", daemon=True).start()


def _await_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a rank is always started by a supervisor"
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)


def _limit_threads(count: str) -> None:
    """OpenMP read its variable when the forkserver started, which may have been for another world size."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(int(count.split(",")[0]))


def _watch(family: _Family, explained: int | None, on_failure: Callable[[str], None] | None) -> int:
    """Waits until all have ended well (0) or one has not (its exit code, named on stderr).

    Ranks that go on for long after a companion that has ended well are left to be stopped.
    """
    ranks = family.all
    running = dict(enumerate(ranks))
    while running:
        patience = LAST_S if family.companion_has_ended else None
        ready = set(connection.wait([child.sentinel for child in running.values()], patience))
        if not ready:
            names = ", ".join(child.name for child in running.values())
            _say(f"{names} went on for {LAST_S:g} s after the companion had ended well; ending them")
            return 1
        ended = {rank: child for rank, child in running.items() if child.sentinel in ready}
        for rank, child in ended.items():
            child.join()
            del running[rank]
        if failed := [rank for rank, child in ended.items() if child.exitcode]:
            return _fail(ranks, failed, explained, on_failure)
    return 0


def _fail(
    ranks: list[Process], failed: list[int], explained: int | None, on_failure: Callable[[str], None] | None
) -> int:
    """The exit code to end with. Of ranks that fail together, one that was killed is the cause."""
    rank = min(failed, key=lambda rank: (_exit_code(ranks[rank]) > 0, rank))
    code = _exit_code(ranks[rank])
    obituary = _obituary(ranks[rank])
    if code != explained:
        _say(f"{obituary}; ending the others")
    if on_failure:
        on_failure(obituary)
    return code if code > 0 else 128 - code


def _say(line: str) -> None:
    print(f"sps2: {line}", file=sys.stderr, flush=True)


def _exit_code(child: Process) -> int:
    assert child.exitcode, "only for a rank that failed"
    return child.exitcode


def _obituary(child: Process) -> str:
    code = _exit_code(child)
    how = f"exited with code {code}" if code > 0 else f"was killed by {signal.Signals(-code).name}"
    return f"{child.name} (pid {child.pid}) {how}"


def _stop(ranks: list[Process], grace_s: float) -> None:
    """Ends what still runs: wait `grace_s`, then SIGTERM, two seconds later SIGKILL."""
    for action, wait_s in ((None, grace_s), (Process.terminate, 2.0), (Process.kill, 2.0)):
        running = [child for child in ranks if child.pid is not None and child.exitcode is None]
        for child in running if action else ():
            action(child)  # type: ignore[misc]
        _join_all(running, wait_s)


def _join_all(children: list[Process], wait_s: float) -> None:
    """Waits at most `wait_s` seconds for all together."""
    end = time.monotonic() + wait_s
    for child in children:
        child.join(max(0.0, end - time.monotonic()))
