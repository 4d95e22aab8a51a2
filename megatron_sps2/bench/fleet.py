"""Servers of a comparison: a real `sps2 serve` for each setting, alive together or one at a time.

Knows processes and /health; knows neither requests nor results.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

START_S = 600.0
DRAIN_S = 60.0
WELL_S = 15.0  # a busy machine's server may be late to say that it is well
LAST_LINES = 15
COMMAND = (sys.executable, "-m", "megatron_sps2", "serve")


@dataclass(frozen=True, slots=True)
class Server:
    """A running server and where it listens."""

    process: subprocess.Popen[bytes]
    base_url: str  # without /v1
    log: Path

    def get(self, path: str) -> tuple[int, str]:
        """(status, body) of a GET; status 0 where nothing answers."""
        try:
            with urllib.request.urlopen(self.base_url + path, timeout=10.0) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def check_alive(self, name: str) -> None:
        """Raises RuntimeError with the log's last lines where the server has ended, or lost its ranks."""
        deadline = time.monotonic() + WELL_S
        while (found := self.get("/health"))[0] != 200:
            if self.process.poll() is not None or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        status, said = found
        if status != 200:
            code = self.process.poll()
            state = f"answers {status}: {said}" if code is None else f"ended with exit code {code}"
            raise RuntimeError(
                f"the server of setting {name} was lost: it {state}; its log ends:\n{last_lines(self.log)}"
            )


class Fleet(AbstractContextManager["Fleet"]):
    """The servers of all settings. `turn(name)` lends one; leaving the fleet ends them all."""

    def __init__(
        self, flags: Mapping[str, Sequence[str]], *, one_at_a_time: bool = False, start_s: float = START_S
    ) -> None:
        """`flags`: of `sps2 serve`, by setting's name."""
        self._flags, self._one_at_a_time, self._start_s = flags, one_at_a_time, start_s
        self._stack, self._running = ExitStack(), dict[str, Server]()

    def start(self, say: Callable[[str], None] = lambda name: None) -> None:
        """All that live together, one after another, so that they do not slow each other down."""
        for name in () if self._one_at_a_time else self._flags:
            say(name)
            self._running[name] = self._stack.enter_context(self._serve(name))

    @contextmanager
    def turn(self, name: str) -> Iterator[Server]:
        """The healthy server of a setting. Raises RuntimeError where it cannot start, or has ended."""
        if self._one_at_a_time:
            with self._serve(name) as server:
                yield server
                server.check_alive(name)
        else:
            server = self._running[name]
            server.check_alive(name)
            yield server
            server.check_alive(name)

    def __exit__(self, *_: object) -> None:
        for server in self._running.values():  # all at once, and then each is waited for
            ask_to_end(server.process)
        self._stack.close()

    @contextmanager
    def _serve(self, name: str) -> Iterator[Server]:
        with tempfile.TemporaryDirectory(prefix="sps2-compare-") as folder:
            port_file, log = Path(folder) / "port", Path(folder) / "log"
            line = (*COMMAND, "--port", "0", "--port-file", str(port_file), *self._flags[name])
            with log.open("wb") as out:
                process = subprocess.Popen(
                    line, stdout=out, stderr=out, env=_environ(), start_new_session=True
                )
            try:
                yield self._await_health(name, process, port_file, log)
            finally:
                end_family(process)

    def _await_health(
        self, name: str, process: subprocess.Popen[bytes], port_file: Path, log: Path
    ) -> Server:
        deadline = time.monotonic() + self._start_s
        while time.monotonic() < deadline and process.poll() is None:
            if port_file.is_file() and (port := port_file.read_text().strip()):
                server = Server(process, f"http://127.0.0.1:{port}", log)
                if server.get("/health")[0] == 200:
                    return server
            time.sleep(0.05)
        code = process.poll()
        reason = f"not healthy after {self._start_s:.0f} s" if code is None else f"exit code {code}"
        raise RuntimeError(
            f"the server of setting {name} did not start ({reason}): sps2 serve {' '.join(self._flags[name])}"
            f"; its log ends:\n{last_lines(log)}"
        )


def last_lines(log: Path, count: int = LAST_LINES) -> str:
    lines = log.read_text(errors="replace").splitlines()[-count:]
    return "\n".join(f"    {line}" for line in lines) or "    (empty)"


def ask_to_end(process: subprocess.Popen[bytes]) -> None:
    """A server that is asked twice ends the same."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)


def end_family(process: subprocess.Popen[bytes]) -> None:
    """Ends a server and whatever it started: asked first, killed if it stays."""
    import psutil

    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    ask_to_end(process)
    try:
        process.wait(DRAIN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    for child in family:
        if child.is_running():
            child.kill()
    psutil.wait_procs(family, timeout=5)


def _environ() -> dict[str, str]:
    """Ours, with one thread to a rank unless the user says otherwise, so that all settings have the same."""
    return {"OMP_NUM_THREADS": "1", **os.environ}
