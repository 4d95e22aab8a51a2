"""A driver as a process: started, asked in turn, given up after a limit. Knows pipes, no engines."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.peers.peers import Peer

ROOT = Path(__file__).parents[2]
# Loading a model and compiling kernels may take this long.
START_LIMIT_S = 600.0


class PeerAbsent(Exception):
    """Why a peer, or one measurement of it, is not there."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One answer. `others`: the share of the machine's cores that other programs took meanwhile."""

    seconds: float
    tokens: list[int]
    others: float


class Asked:
    """One running driver."""

    def __init__(self, peer: Peer, flags: list[str], log: Path, num_ranks: int) -> None:
        if reason := peer.missing():
            raise PeerAbsent(reason)
        command = [
            str(peer.python),
            "-m",
            peer.module,
            "--setting",
            peer.setting,
            *flags,
        ]
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log.open("a")
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=_environ(peer, num_ranks),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            start_new_session=True,
        )
        try:
            self.what: str = self._read(START_LIMIT_S)["ready"]
        except PeerAbsent:
            self.close()
            raise

    def ask(self, request: dict[str, Any], limit_s: float) -> Measured:
        """Raises PeerAbsent with the reason when the peer cannot, ended, or took longer; then it is over."""
        busy, own, start = _busy_seconds(), self._own_seconds(), time.perf_counter()
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerAbsent("its driver has ended") from None
        answer = self._read(limit_s)
        wall = (time.perf_counter() - start) * (os.cpu_count() or 1)
        others = (_busy_seconds() - busy - (self._own_seconds() - own)) / wall
        return Measured(answer["seconds"], answer["tokens"], max(0.0, others))

    def close(self) -> None:
        """Ends it and every process it has started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
            except ProcessLookupError:
                break
            time.sleep(0.2)
        self._process.wait()
        self._log.close()

    @property
    def is_running(self) -> bool:
        return self._process.poll() is None and not self._log.closed

    def _read(self, limit_s: float) -> dict[str, Any]:
        assert self._process.stdout
        if not select.select([self._process.stdout], [], [], limit_s)[0]:
            self.close()
            raise PeerAbsent(f"more than {limit_s:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            self.close()
            raise PeerAbsent(f"ended with {self._process.returncode}; see {self._log.name}")
        message: dict[str, Any] = json.loads(line)
        if "error" in message:
            raise PeerAbsent(message["error"])
        return message

    def _own_seconds(self) -> float:
        """CPU seconds of the driver and the processes under it."""
        total = 0.0
        # Helpers of a compiler come and go; one that just went is not counted.
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self._process.pid)
            for process in (root, *root.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    times = process.cpu_times()
                    total += times.user + times.system
        return total


def _environ(peer: Peer, num_ranks: int) -> dict[str, str]:
    """Threads for a peer of one process; a driver with ranks gives each rank one."""
    return os.environ | {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1" if peer.has_ranks else str(num_ranks),
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system + times.irq + times.softirq)
