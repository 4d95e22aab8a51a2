"""A front end whose engine comes and goes: ask it, wait for its engine, end a rank of it."""

from __future__ import annotations

import json
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.served import Server, kill_family
from tests.sps2_command import ROOT, SPS2, environ
from tests.tiny_llama import prompt

PROMPT = prompt(200).tolist()
BACK_S = 60.0


def ask(server: Server, num_tokens: int = 8) -> tuple[int, str, str | None]:
    """(status, text or error, Retry-After) of a completion; status 0 where the connection broke."""
    body = {"prompt": PROMPT, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(f"{server.base_url}/v1/completions", json.dumps(body).encode())
    request.add_header("Content-Type", "application/json")
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            return reply.status, json.load(reply)["choices"][0]["text"], None
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)["error"]["message"], error.headers["Retry-After"]
    except OSError as error:
        return 0, str(error), None


def await_answer(server: Server) -> str:
    """The text, as soon as the engine is back; until then every answer is 503 and says when to come again."""
    end, refused = time.monotonic() + BACK_S, 0
    while True:
        status, text, retry = ask(server)
        if status == 200:
            assert refused, "the engine was never missed"
            return text
        assert status == 503 and retry == "5" and ("again" in text or "being loaded" in text), (status, text)
        refused += 1
        assert time.monotonic() < end, server.log.read_text()
        time.sleep(0.2)


def await_loss(server: Server) -> None:
    end = time.monotonic() + BACK_S
    while server.get("/health")[0] == 200:
        assert time.monotonic() < end
        time.sleep(0.02)


def rank_of(server: Server, rank: int) -> psutil.Process:
    """By the process that the newest heartbeat names."""
    return psutil.Process(next(each["pid"] for each in server.json("/live")["ranks"] if each["rank"] == rank))


@contextmanager
def front_end(checkpoint: Path, address: str, folder: Path) -> Iterator[Server]:
    port_file, log = folder / "port", folder / "log"
    flags = ("--sp", "2", "--role", "front-end", "--engine-address", address, "--port", "0")
    command = (*SPS2, "serve", "--checkpoint", str(checkpoint), *flags, "--port-file", str(port_file))
    with log.open("w") as err:
        process = subprocess.Popen(command, stderr=err, text=True, env=environ(), cwd=ROOT)
    try:
        end = time.monotonic() + BACK_S
        while not port_file.exists():
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.05)
        yield Server(process, f"http://127.0.0.1:{port_file.read_text()}", log)
    finally:
        kill_family(process)


def free_pair() -> int:
    """A port that is free, and so is the next."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as first:
            port = int(first.getsockname()[1])
            try:
                socket.create_server(("127.0.0.1", port + 1)).close()
            except OSError:
                continue
            return port
