"""Two network namespaces that play two hosts: own addresses and names, and a cable that can be cut.

Knows `ip`, not ranks. Needs root and a kernel that lets it make namespaces; `reason_against` says what lacks.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

CARD = "eth0"  # of both hosts
ETC = Path("/etc/netns")  # `ip netns exec NAME` lays the files of ETC/NAME over those of /etc
AS_HOST = ("unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"')


@dataclass(frozen=True, slots=True)
class TwoHosts:
    """Hosts 0 and 1. Each resolves both names until `resolve` says otherwise."""

    names: tuple[str, str]  # of the namespaces, and the hosts' own names
    addresses: tuple[str, str]

    def popen(
        self,
        host: int,
        command: Sequence[str],
        env: Mapping[str, str],
        stdout: IO[str] | int = subprocess.PIPE,
        stderr: IO[str] | int = subprocess.PIPE,
    ) -> subprocess.Popen[str]:
        """Starts `command` on a host; the process is the command's own, so signals reach it."""
        name = self.names[host]
        line = ["ip", "netns", "exec", name, *AS_HOST, name, *command]
        return subprocess.Popen(line, env=dict(env), stdout=stdout, stderr=stderr, text=True)

    def cut(self, *, silent: bool = True) -> None:
        """Nothing passes any more, in both directions.

        Silent: what is sent is lost, as behind a switch that died. Otherwise the cards go down: to a new
        connection the network is unreachable at once. Connections that stand get no error either way: TCP
        waits and sends again.
        """
        for name in self.names:
            if silent:
                _run("tc", "-n", name, "qdisc", "replace", "dev", CARD, "root", "blackhole")
            else:
                _run("ip", "-n", name, "link", "set", CARD, "down")

    def mend(self) -> None:
        """The cable is whole again; harmless where it was."""
        for name in self.names:
            _run("ip", "-n", name, "link", "set", CARD, "up")
            _run("tc", "-n", name, "qdisc", "replace", "dev", CARD, "root", "pfifo")

    def resolve(self, how: str = "addresses") -> None:
        """What the hosts' names mean on each of them, for processes that start from now on.

        addresses: those that the other reaches. loopback: the own name is 127.0.1.1, as Debian's installer
        writes it. none: names mean nothing.
        """
        for me, name in enumerate(self.names):
            lines = ["127.0.0.1 localhost"]
            if how == "loopback":
                lines += [f"127.0.1.1 {name}", f"{self.addresses[1 - me]} {self.names[1 - me]}"]
            elif how == "addresses":
                lines += [f"{a} {n}" for a, n in zip(self.addresses, self.names, strict=True)]
            (ETC / name / "hosts").write_text("\n".join(lines) + "\n")

    def bytes_sent(self, host: int) -> int:
        """By the host's card so far; tells a transfer under way."""
        shown = json.loads(_run("ip", "-n", self.names[host], "-json", "-stats", "link", "show", CARD))
        return int(shown[0]["stats64"]["tx"]["bytes"])

    def end_processes(self) -> None:
        """Kills whatever runs on either host, and waits until it is gone."""
        end = time.monotonic() + 10
        while found := [int(pid) for name in self.names for pid in _run("ip", "netns", "pids", name).split()]:
            assert time.monotonic() < end, f"processes {found} outlive SIGKILL"
            for pid in found:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)


@contextmanager
def two_hosts() -> Iterator[TwoHosts]:
    """Two hosts on one cable, without a route to elsewhere; at the end all of it is gone, processes too."""
    tag = secrets.token_hex(3)
    hosts = TwoHosts((f"left-{tag}", f"right-{tag}"), ("10.77.0.1", "10.77.0.2"))
    try:
        for name in hosts.names:
            _run("ip", "netns", "add", name)
            (ETC / name).mkdir(parents=True)
        _plug(hosts)
        hosts.resolve()
        yield hosts
    finally:
        _remove(hosts)


def _plug(hosts: TwoHosts) -> None:
    left, right = hosts.names
    _run("ip", "-n", left, "link", "add", CARD, "type", "veth", "peer", "name", CARD, "netns", right)
    for name, address in zip(hosts.names, hosts.addresses, strict=True):
        _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", CARD)
        for card in ("lo", CARD):
            _run("ip", "-n", name, "link", "set", card, "up")


def _remove(hosts: TwoHosts) -> None:
    made = [name for name in hosts.names if Path("/run/netns", name).exists()]
    if made == list(hosts.names):
        hosts.end_processes()
    for name in made:
        _run("ip", "netns", "delete", name)
    for name in hosts.names:
        shutil.rmtree(ETC / name, ignore_errors=True)
    with contextlib.suppress(OSError):  # Others may have files there.
        ETC.rmdir()


def reason_against() -> str | None:
    """Why there can be no two hosts here; None where they can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    for tool in ("ip", "tc", "unshare", "hostname"):
        if shutil.which(tool) is None:
            return f"no {tool} here; Debian's packages iproute2, util-linux and hostname have them"
    try:
        with two_hosts() as hosts:
            return None if hosts.popen(0, ["true"], os.environ).wait() == 0 else "unshare --uts fails here"
    except RuntimeError as error:
        return str(error)


def _run(*command: str) -> str:
    """Output of a command that must succeed; RuntimeError says why it did not."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout
