"""Ranks on two hosts, one each, by torchrun on both: the answers of one host, and what a cut cable does.

The hosts are network namespaces (two_hosts.py): own addresses and names, and one cable.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.sps2_command import ROOT, TIMEOUT_S, answer, environ, make_checkpoint, write_ids
from tests.two_hosts import TwoHosts, reason_against, two_hosts

REASON = reason_against()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(REASON is not None, reason=str(REASON)),
    pytest.mark.timeout(TIMEOUT_S),
]

# Of the hosts' own networks: nobody else's.
RENDEZVOUS_PORT, HTTP_PORT = 29500, 8000
PROMPT = range(5, 42)
SAME, PHASES = ("token_ids", "text", "kv_tokens_per_rank", "ledger"), ("prefill", "decode")
# Its prefill takes tens of seconds, and about 3 MB a layer go over the cable each way.
LONG, NUM_LAYERS = [5 + i % 200 for i in range(16000)], 20
FEW_LAYERS_SENT = 10_000_000
SOME_TOKENS_SENT = 300_000
START_S = 100  # until the server is healthy
CUT_S = 30  # from the cut to the end of both launchers, of which heartbeats wait 10


@dataclass(frozen=True, slots=True)
class Launched:
    """The two launchers, one a host, and what they and their ranks write."""

    launchers: tuple[subprocess.Popen[str], subprocess.Popen[str]]
    folder: Path

    def stdout(self, host: int) -> str:
        return (self.folder / f"out-{host}").read_text()

    def stderr(self, host: int) -> str:
        return (self.folder / f"err-{host}").read_text()

    def assert_alive(self) -> None:
        assert [each.poll() for each in self.launchers] == [None, None], self.stderr(0) + self.stderr(1)

    def end(self, timeout: float) -> list[int]:
        """Exit codes; TimeoutExpired where they do not come within `timeout` seconds for both."""
        end = time.monotonic() + timeout
        return [each.wait(max(0.0, end - time.monotonic())) for each in self.launchers]


@pytest.fixture(scope="module")
def network() -> Iterator[TwoHosts]:
    with two_hosts() as hosts:
        yield hosts


@pytest.fixture
def hosts(network: TwoHosts) -> Iterator[TwoHosts]:
    """A whole cable, names that mean addresses, and nothing that still runs afterwards."""
    network.resolve()
    yield network
    network.mend()
    network.end_processes()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("two-hosts"), num_hidden_layers=NUM_LAYERS)


@pytest.fixture(scope="module")
def flags(checkpoint: Path) -> tuple[object, ...]:
    ids = write_ids(checkpoint.parent / "ids.json", PROMPT)
    return (
        "--checkpoint",
        checkpoint,
        "--sp",
        2,
        "--prompt-ids",
        ids,
        "--max-tokens",
        12,
        "--temperature",
        0,
    )


@pytest.fixture(scope="module")
def local(flags: tuple[object, ...]) -> dict[str, Any]:
    """The answer of two ranks of our own spawner, on one host."""
    return answer(*flags)


def launch(hosts: TwoHosts, folder: Path, *args: object, fixed: bool = True, **extra: str) -> Launched:
    """`sps2 ARGS` by torchrun on both hosts; `fixed`: rank 0 on the first, else as torchrun chooses."""
    started = []
    for host in (0, 1):
        where = {"NNODES": "2", "NPROC": "1", **({"NODE_RANK": str(host)} if fixed else {})}
        where["RDZV_ENDPOINT"] = f"{hosts.addresses[0]}:{RENDEZVOUS_PORT}"
        command = ("bash", str(ROOT / "launch" / "torchrun.sh"), *map(str, args))
        with (folder / f"out-{host}").open("w") as out, (folder / f"err-{host}").open("w") as err:
            started.append(hosts.popen(host, command, environ(**where, **extra), out, err))
    return Launched((started[0], started[1]), folder)


def python(hosts: TwoHosts, host: int, code: str, *args: object) -> str:
    """What `code` prints on that host."""
    process = hosts.popen(host, (sys.executable, "-c", code, *map(str, args)), environ())
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err
    return out.strip()


LISTEN = (
    "import socket; s = socket.create_server(('', 7)); print('ready', flush=True); s.accept(); s.accept()"
)
KNOCK = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 7), timeout=1).close()
    print("open")
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("silent", "what"), [(True, "timed out"), (False, "[Errno 101] Network is unreachable")]
)
def test_a_cut_cable_passes_nothing_until_it_is_mended(hosts: TwoHosts, silent: bool, what: str) -> None:
    listener = hosts.popen(1, (sys.executable, "-c", LISTEN), environ())
    assert listener.stdout and listener.stdout.readline() == "ready\n"
    assert python(hosts, 0, KNOCK, hosts.addresses[1]) == "open"
    hosts.cut(silent=silent)
    assert python(hosts, 0, KNOCK, hosts.addresses[1]) == what
    hosts.mend()
    assert python(hosts, 0, KNOCK, hosts.addresses[1]) == "open"


def test_two_hosts_answer_as_one_does(
    hosts: TwoHosts, flags: tuple[object, ...], local: dict[str, Any], tmp_path: Path
) -> None:
    before = hosts.bytes_sent(0)
    run = launch(hosts, tmp_path, "generate", *flags, "--json")
    assert run.end(TIMEOUT_S) == [0, 0], run.stderr(0) + run.stderr(1)
    found = json.loads(run.stdout(0))
    assert [found[key] for key in SAME] == [local[key] for key in SAME] and run.stdout(1) == ""
    booked = sum(sum(found["ledger"][p]["bytes_by_collective_per_rank"][0].values()) for p in PHASES)
    assert hosts.bytes_sent(0) - before > booked > 0


WAIT = """
import json, sys, time, urllib.request
while True:
    try:
        with urllib.request.urlopen("http://127.0.0.1:8000" + sys.argv[1], timeout=5) as answer:
            found = json.load(answer)
        if eval(sys.argv[2], {"found": found}):
            break
    except OSError as error:
        print(error, flush=True)
    time.sleep(0.05)
"""
ASK = """
import json, sys, urllib.error, urllib.request
ids, num_tokens = json.loads(sys.argv[1]), int(sys.argv[2])
body = {"prompt": ids, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
request = urllib.request.Request("http://127.0.0.1:8000/v1/completions", json.dumps(body).encode())
request.add_header("Content-Type", "application/json")
try:
    with urllib.request.urlopen(request, timeout=60) as answer:
        print(answer.read().decode())
except urllib.error.HTTPError as error:
    sys.exit(error.read().decode())
"""


def wait(hosts: TwoHosts, run: Launched, path: str, condition: str = "True") -> None:
    """Until the server on the first host answers a GET of `path` with what meets `condition`."""
    end = time.monotonic() + START_S
    waiting = hosts.popen(0, (sys.executable, "-c", WAIT, path, condition), environ(), subprocess.DEVNULL)
    while waiting.poll() is None:
        assert time.monotonic() < end, f"{path} never answered with {condition}"
        run.assert_alive()
        time.sleep(0.05)
    assert waiting.returncode == 0


def test_a_server_over_two_hosts_answers_as_one_host_does_and_drains(
    hosts: TwoHosts, checkpoint: Path, local: dict[str, Any], tmp_path: Path
) -> None:
    """Where a host's own name is of no use to others, as often; healthy means that rank 1 beats."""
    hosts.resolve("loopback")
    flags = ("--checkpoint", checkpoint, "--sp", 2, "--port", HTTP_PORT, "--short-prompt-tokens", 1)
    run = launch(hosts, tmp_path, "serve", *flags)
    wait(hosts, run, "/health")
    found = json.loads(python(hosts, 0, ASK, [*PROMPT], 12))
    assert found["choices"][0]["text"] == local["text"] and found["timings"]["sp_size"] == 2
    last = hosts.popen(0, (sys.executable, "-c", ASK, str([*PROMPT]), "60"), environ())
    wait(hosts, run, "/live", "any(each['num_generated'] > 3 for each in found['requests'])")
    for launcher in run.launchers:
        launcher.send_signal(signal.SIGTERM)
    out, err = last.communicate(timeout=60)
    assert last.returncode == 0, err + run.stderr(0) + run.stderr(1)
    assert json.loads(out)["usage"]["completion_tokens"] == 60
    run.end(30)  # torchrun itself exits with 1 for every signal.
    assert "sps2: error" not in run.stderr(0) + run.stderr(1)


def test_a_cable_cut_in_mid_prefill_is_a_named_error_on_both_hosts(
    hosts: TwoHosts, checkpoint: Path, tmp_path: Path
) -> None:
    """With the time-outs that users get; to what is connected, cards that go down look the same."""
    ids = write_ids(tmp_path / "ids.json", LONG)
    before = hosts.bytes_sent(0)
    prompt = ("--checkpoint", checkpoint, "--sp", 2, "--prompt-ids", ids)
    run = launch(hosts, tmp_path, "generate", *prompt)
    while hosts.bytes_sent(0) - before < FEW_LAYERS_SENT:
        run.assert_alive()
        time.sleep(0.05)
    hosts.cut()
    assert 0 not in run.end(CUT_S)
    for host in (0, 1):
        errors = [line for line in run.stderr(host).splitlines() if line.startswith("sps2: error")]
        other = 1 - host
        assert any(f"rank {other}" in line and hosts.names[other] in line for line in errors), errors
        assert run.stdout(host) == ""


def test_ranks_of_two_hosts_meet_again_after_one_was_killed(
    hosts: TwoHosts, flags: tuple[object, ...], local: dict[str, Any], tmp_path: Path
) -> None:
    """By torchrun on both: the host whose rank died counts a restart, the other one does not."""
    before = hosts.bytes_sent(0)
    answer_of = ("generate", *flags, "--json")
    many = ("--max-tokens", 64, "--ignore-eos")
    run = launch(hosts, tmp_path, *answer_of, *many, fixed=False, MAX_RESTARTS="2")
    while hosts.bytes_sent(0) - before < SOME_TOKENS_SENT:
        run.assert_alive()
        time.sleep(0.05)
    psutil.Process(run.launchers[1].pid).children(recursive=True)[-1].kill()
    assert run.end(TIMEOUT_S) == [0, 0], run.stderr(0) + run.stderr(1)
    found = json.loads(run.stdout(0) + run.stdout(1))
    assert found["token_ids"][:12] == local["token_ids"] and len(found["token_ids"]) == 64
    assert "has ended; last heard in " in run.stderr(0)
