"""The HTTP front end as `sps2 serve` starts it: here, beside the ranks of this host, or detached from rank 0.

A detached one outlives rank 0 where a launcher starts ranks again: its record in the temporary folder, under
the launcher's process, leads the next rank 0 to it. Knows processes, no engine.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import signal
import socket
import stat
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType

import psutil

from megatron_sps2.cli.process import RUN_ERROR, report, set_logging
from megatron_sps2.cli.serve_arguments import api_keys
from megatron_sps2.parallel.heartbeat import NAME_S
from megatron_sps2.parallel.host import bound_to
from megatron_sps2.parallel.local_world import Companion
from megatron_sps2.server.beats import tell_lost
from megatron_sps2.server.front_end_config import FrontEndConfig
from megatron_sps2.server.protocol import Endpoints

GRACE_S = 10.0
# From the end of a front end to that of rank 0, which may be writing a trace.
LAST_S = 60.0


def front_end_config(args: argparse.Namespace, endpoints: Endpoints, **changes: object) -> FrontEndConfig:
    config = FrontEndConfig(
        host=args.host,
        port=args.port,
        port_file=args.port_file,
        endpoints=endpoints,
        checkpoint=args.checkpoint,
        served_model_name=args.served_model_name or Path(args.checkpoint).resolve().name,
        api_keys=api_keys(args),
        num_replicas=args.dp,
        world_size=args.dp * args.sp * args.tp,
        max_queue=args.max_queue,
        max_body_bytes=int(args.max_body_mib * 2**20),
        request_timeout_s=args.request_timeout_s,
        drain_timeout_s=args.drain_timeout_s,
        heartbeat_timeout_s=args.heartbeat_timeout_s,
        log_level=args.log_level,
    )
    return dataclasses.replace(config, **changes)  # type: ignore[arg-type]


def run_here(config: FrontEndConfig) -> int:
    """In this process -> its exit code."""
    from megatron_sps2.server.front_end import run

    set_logging(config.log_level)
    try:
        return run(config)
    except Exception as error:  # The outermost loop of this process.
        return report(error)


def companion(config: FrontEndConfig) -> Companion:
    """Beside local ranks."""
    return Companion(
        name="front end",
        target=run_here,
        args=(config,),
        on_failure=lambda message: tell_lost(config.endpoints.beats, message),
    )


# Addresses.


def endpoints_in(folder: str) -> Endpoints:
    """On this host."""
    return Endpoints(engine=f"ipc://{folder}/engine", beats=f"ipc://{folder}/beats")


def endpoints_of(host: str) -> Endpoints:
    """Free ports of this host, under the name by which the other hosts reach it."""
    with socket.socket() as first, socket.socket() as second:
        ports = []
        for probe in (first, second):
            probe.bind(("", 0))
            ports.append(probe.getsockname()[1])
    return _tcp(host, *ports)


def endpoints_at(address: str) -> Endpoints:
    """HOST:PORT of a front end that was started by itself: the engine's port, and the next one for beats."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65535:
        raise ValueError(f"--engine-address {address!r} must be HOST:PORT with a port in 1..65534")
    return _tcp(host, int(port), int(port) + 1)


def _tcp(host: str, engine: int, beats: int) -> Endpoints:
    name = f"[{host}]" if ":" in host.strip("[]") and not host.startswith("[") else host
    return Endpoints(engine=f"tcp://{name}:{engine}", beats=f"tcp://{name}:{beats}")


# Detached, under a launcher.


class Detached:
    """The front end's process, which this rank 0 or one before it has started."""

    def __init__(self, pid: int, endpoints: Endpoints, is_broken: Callable[[], bool]) -> None:
        self._process, self.endpoints, self._is_broken = psutil.Process(pid), endpoints, is_broken
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._on_signal)
        threading.Thread(target=self._watch, name="front end watch", daemon=True).start()

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        threading.Thread(target=self._drain, name="drain", daemon=True).start()

    def _drain(self) -> None:
        """A launcher that starts the ranks again ends those that are left in the same way as a user does."""
        if restarts_left(os.environ):
            time.sleep(NAME_S)
        if not self._is_broken():
            with contextlib.suppress(psutil.NoSuchProcess):
                self._process.terminate()

    def _watch(self) -> None:
        """A front end that fails has found this world broken: this rank may be waiting in it for ever."""
        code = self._wait(None)
        if not code:  # A drain has told this rank to go; where it was not told, nobody will tell it.
            time.sleep(LAST_S)
        os._exit(code or RUN_ERROR)

    def _wait(self, timeout_s: float | None) -> int | None:
        """Its exit code; None where it is no child of this process, or does not end in time."""
        try:
            code: int | None = self._process.wait(timeout_s)
        except psutil.TimeoutExpired:
            return None
        return code

    def await_end(self) -> int:
        return self._wait(GRACE_S) or 0


def start_or_find(
    args: argparse.Namespace, choose: Callable[[str], Endpoints], is_broken: Callable[[], bool]
) -> Detached:
    """On rank 0. `choose(folder)` gives the addresses of a new one; `is_broken()`: a rank was lost."""
    record = _record() if _restarts(os.environ)[1] else None
    found = _find(record) if record else None
    if found:
        return Detached(*found, is_broken)
    folder = tempfile.mkdtemp(prefix="sps2-")
    config = front_end_config(args, choose(folder), leftovers=(folder,), keeper_pid=os.getpid())
    if record:
        leftovers = (folder, str(record))
        config = dataclasses.replace(
            config, outlives_engine=True, keeper_pid=os.getppid(), leftovers=leftovers
        )
    process = multiprocessing.get_context("spawn").Process(
        target=_run_detached, args=(config,), name="front end"
    )
    with bound_to(args.all_cores):  # It is no rank: it may run where it likes.
        process.start()
    assert process.pid is not None
    if record:
        _write(record, process.pid, config.endpoints)
    return Detached(process.pid, config.endpoints, is_broken)


def restarts_left(environ: Mapping[str, str]) -> bool:
    """Whether torchrun would start the ranks once more."""
    count, most = _restarts(environ)
    return count < most


def _restarts(environ: Mapping[str, str]) -> tuple[int, int]:
    """(how often torchrun has started the ranks again, how often it may); 0 without it."""
    names = ("TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_MAX_RESTARTS")
    count, most = (int(text) if (text := environ.get(name, "")).isdecimal() else 0 for name in names)
    return count, most


def _run_detached(config: FrontEndConfig) -> None:
    os.setsid()  # What ends rank 0's process group does not end this.
    sys.exit(run_here(config))


def _record() -> Path:
    """Of the launcher's process: that one starts rank 0 again."""
    keeper = psutil.Process(os.getppid())
    name = f"sps2-front-end-{os.getuid()}-{keeper.pid}-{int(keeper.create_time())}.json"
    return Path(tempfile.gettempdir()) / name


def _write(record: Path, pid: int, endpoints: Endpoints) -> None:
    """Whole or not at all."""
    began = psutil.Process(pid).create_time()
    beside = record.with_suffix(f".{os.getpid()}")
    file = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with open(file, "w", encoding="utf-8") as text:
        json.dump({"pid": pid, "began": began, **dataclasses.asdict(endpoints)}, text)
    beside.rename(record)


def _find(record: Path) -> tuple[int, Endpoints] | None:
    """Process and addresses of one that lives, and is this user's own."""
    if not record.is_file() or record.is_symlink():
        return None
    about = record.stat()
    if about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) != 0o600:
        return None
    found = json.loads(record.read_text(encoding="utf-8"))
    pid, began = found.pop("pid"), found.pop("began")
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        if process.create_time() == began and process.status() != psutil.STATUS_ZOMBIE:
            return pid, Endpoints(**found)
    return None
