"""`sps2 serve` as a user starts it: a process of its own on a free port, until it is healthy, and its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

START_S = 180.0
END_S = 60.0


@dataclass(frozen=True, slots=True)
class Server:
    """A running server and where it listens."""

    process: subprocess.Popen[str]
    base_url: str
    log: Path  # its stderr

    def get(self, path: str, timeout: float = 10.0) -> tuple[int, str]:
        """(status, body) of a GET."""
        try:
            with urllib.request.urlopen(self.base_url + path, timeout=timeout) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def json(self, path: str) -> Any:
        status, body = self.get(path)
        assert status == 200, f"{path} answers {status}: {body}"
        return json.loads(body)

    def metrics(self) -> dict[str, float]:
        """Name with labels -> value of every sample at /metrics."""
        lines = [line for line in self.get("/metrics")[1].splitlines() if line and not line.startswith("#")]
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        return sum(v for key, v in self.metrics().items() if key.partition("{")[0] == name)

    def end(self, signum: int = signal.SIGTERM, timeout: float = END_S) -> int:
        """Signals the server and waits -> its exit code."""
        self.process.send_signal(signum)
        return self.process.wait(timeout)


@contextmanager
def serve(
    checkpoint: str | Path, *flags: object, command: tuple[str, ...] = (), **environ: str
) -> Iterator[Server]:
    """A healthy server of `checkpoint`; killed with all its processes at the end if it still runs."""
    with tempfile.TemporaryDirectory(prefix="served-") as folder:
        port_file, log = Path(folder) / "port", Path(folder) / "log"
        start = command or (sys.executable, "-m", "megatron_sps2")
        line = (*start, "serve", "--checkpoint", checkpoint, "--port", 0, "--port-file", port_file, *flags)
        env = {**os.environ, "OMP_NUM_THREADS": "1", **environ}
        with log.open("w") as err:
            process = subprocess.Popen(
                list(map(str, line)), stdout=err, stderr=err, text=True, env=env, start_new_session=True
            )
        try:
            yield _await_health(process, port_file, log)
        finally:
            kill_family(process)


def _await_health(process: subprocess.Popen[str], port_file: Path, log: Path) -> Server:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        if port_file.exists():
            server = Server(process, f"http://127.0.0.1:{port_file.read_text().strip()}", log)
            if server.get("/health")[0] == 200:
                return server
        time.sleep(0.05)
    raise RuntimeError(f"the server did not become healthy: {log.read_text()}")


def kill_family(process: subprocess.Popen[str]) -> None:
    import psutil

    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    process.kill()
    process.wait()
    for child in family:
        if child.is_running():
            child.kill()
    psutil.wait_procs(family, timeout=5)
