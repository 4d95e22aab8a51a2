"""What a server promises when something breaks: clients hear of it, and it ends as supervisors expect."""

from __future__ import annotations

import json
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.served import Server, serve
from checkpoints_tools.convert import convert
from tests.sps2_command import MAX_SEQ_LEN, make_checkpoint
from tests.tiny_llama import VOCAB_SIZE, prompt

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

TOLD_S = 10  # until every waiting client has an error
ENDED_S = 25  # until no process is left


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("failing")
    make_checkpoint(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(folder: Path) -> Path:
    return folder / "checkpoint"


GOOD = prompt(900, seed=3).tolist()
NUM_GOOD = 40


def poison(folder: Path) -> tuple[Path, int]:
    """The same model with a token whose embedding is not a number; GOOD and its answer do not hold it."""
    hf = LlamaForCausalLM.from_pretrained(folder / "hf").eval()
    hf.generation_config.eos_token_id = None  # as with ignore_eos
    whole = hf.generate(torch.tensor([GOOD]), max_new_tokens=NUM_GOOD, do_sample=False)
    token = next(i for i in range(3, VOCAB_SIZE) if i not in whole[0])
    hf.model.embed_tokens.weight.data[token] = torch.nan
    hf.save_pretrained(folder / "hf")
    with mock.patch("checkpoints_tools.convert.CheckedSource", lambda source: source):  # it would refuse
        convert(folder / "hf", folder / "poisoned")
    return folder / "poisoned", token


def post(server: Server, ids: list[int], num_tokens: int, stream: bool = False) -> tuple[int, str]:
    """(status, body); status 0 where the connection broke."""
    body = {"prompt": ids, "max_tokens": num_tokens, "temperature": 0, "ignore_eos": True, "stream": stream}
    request = urllib.request.Request(
        f"{server.base_url}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=120) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError as error:
        return 0, str(error)


def processes(server: Server) -> list[psutil.Process]:
    """[rank 0, rank 1, front end]: children of the forkserver, in the order in which they were started."""
    family = psutil.Process(server.process.pid).children(recursive=True)
    found = sorted((p for p in family if p.ppid() != server.process.pid), key=lambda p: p.pid)
    assert len(found) == 3, found
    return found


def await_state(server: Server, reached: Callable[[dict[str, Any]], bool]) -> None:
    end = time.monotonic() + 60
    while not reached(server.json("/live")):
        assert time.monotonic() < end, server.json("/live")
        time.sleep(0.02)


def is_prefilling(live: dict[str, Any]) -> bool:
    return live["num_prefilling"] > 0


def is_decoding(live: dict[str, Any]) -> bool:
    return sum(each["num_generated"] > 3 for each in live["requests"]) >= 2


LONG = [5 + i % 200 for i in range(MAX_SEQ_LEN - 100)]


def ask_in_trouble(pool: ThreadPoolExecutor, server: Server, phase: str) -> list[Future[tuple[int, str]]]:
    """Two clients that stream and two that wait, in mid-prefill or in mid-decode."""
    if phase == "prefill":
        asks = [pool.submit(post, server, LONG, 8, stream) for stream in (True, False)]
        await_state(server, is_prefilling)
        return [*asks, *(pool.submit(post, server, prompt(900).tolist(), 4000, s) for s in (True, False))]
    asks = [pool.submit(post, server, prompt(n).tolist(), 9000, s) for n in (20, 900) for s in (True, False)]
    await_state(server, is_decoding)
    return asks


@pytest.mark.parametrize(
    ("phase", "victim", "signum"),
    [
        ("prefill", 1, signal.SIGKILL),
        ("decode", 0, signal.SIGKILL),
        ("decode", 1, signal.SIGSTOP),
    ],
    ids=["killed in mid-prefill", "killed in mid-decode", "stopped in mid-decode"],
)
def test_a_lost_rank_is_told_to_all_clients_and_ends_the_server(
    checkpoint: Path, phase: str, victim: int, signum: int
) -> None:
    flags = ("--sp", 2, "--heartbeat-timeout-s", 3)
    with ThreadPoolExecutor(8) as pool, serve(checkpoint, *flags) as server:
        family = processes(server)
        asks = ask_in_trouble(pool, server, phase)
        family[victim].send_signal(signum)
        start = time.monotonic()
        health: list[int] = []
        for ask in as_completed(asks, timeout=TOLD_S):
            status, body = ask.result()
            assert status == 503 or (status == 200 and '"error"' in body and "[DONE]" not in body), body
            assert f"rank {victim}" in body, body
            health.append(_health(server))
        assert time.monotonic() - start < TOLD_S and 200 not in health, health
        assert server.process.wait(timeout=ENDED_S) not in (0, None)
        assert psutil.wait_procs(family, timeout=5)[1] == []
        assert f"rank {victim}" in server.log.read_text()


def test_a_rank_that_is_stopped_for_five_seconds_costs_time_and_nothing_else(checkpoint: Path) -> None:
    """With the time-outs that users get, in mid-prefill and mid-decode alike."""
    with ThreadPoolExecutor(8) as pool, serve(checkpoint, "--sp", 2, "--no-enable-prefix-caching") as server:
        victim = processes(server)[1]
        work = [(LONG[:8000], 4), (GOOD, 120), (GOOD[:20], 160), (GOOD[:600], 120)]
        wanted = [post(server, ids, count) for ids, count in work]
        asks = [pool.submit(post, server, ids, count) for ids, count in work]
        await_state(server, lambda live: is_prefilling(live) and live["num_running"] > 0)
        victim.send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        time.sleep(5)
        assert not asks[0].done(), "its prefill was not under way"
        victim.send_signal(signal.SIGCONT)
        found = [ask.result(timeout=60) for ask in asks]
        assert time.monotonic() - begin > 5
        assert [text_of(each) for each in found] == [text_of(each) for each in wanted]
        assert server.get("/health")[0] == 200 and server.metric("sps2:kv_blocks_leaked") == 0
        assert server.end() == 0


def text_of(reply: tuple[int, str]) -> str:
    status, body = reply
    assert status == 200, body
    return str(json.loads(body)["choices"][0]["text"])


def _health(server: Server) -> int:
    try:
        return server.get("/health", timeout=5)[0]
    except OSError:
        return 0


def test_sigterm_finishes_what_runs_refuses_what_comes_and_exits_with_0(checkpoint: Path) -> None:
    with ThreadPoolExecutor(8) as pool, serve(checkpoint, "--sp", 2) as server:
        family = processes(server)
        asks = [
            pool.submit(post, server, prompt(n).tolist(), 400, s) for n in (20, 900) for s in (True, False)
        ]
        await_state(server, is_decoding)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        refused, _ = post(server, prompt(20).tolist(), 4)
        assert refused in (503, 0) and _health(server) != 200
        for ask in asks:
            status, body = ask.result(timeout=60)
            assert status == 200 and '"error"' not in body, body
        assert server.process.wait(timeout=ENDED_S) == 0
        assert psutil.wait_procs(family, timeout=5)[1] == []


def test_a_drain_that_takes_too_long_ends_the_rest_with_an_error(checkpoint: Path) -> None:
    with ThreadPoolExecutor(2) as pool, serve(checkpoint, "--sp", 2, "--drain-timeout-s", 1) as server:
        asks = [pool.submit(post, server, prompt(20).tolist(), 15000, stream) for stream in (True, False)]
        await_state(server, is_decoding)
        assert server.end() == 0
        assert all(ask.result()[0] in (200, 503) and '"error"' in ask.result()[1] for ask in asks)


def test_a_poisoned_request_fails_alone(folder: Path) -> None:
    """Its neighbours in the batch, and those that get its blocks later, answer as without it."""
    poisoned, token = poison(folder)
    bad = [*GOOD[:700], token, *GOOD[700:]]
    with ThreadPoolExecutor(8) as pool, serve(poisoned, "--sp", 2, "--num-kv-blocks", 300) as server:
        wanted = json.loads(post(server, GOOD, NUM_GOOD)[1])["choices"][0]["text"]
        for _ in range(2):
            asks = [pool.submit(post, server, ids, NUM_GOOD) for ids in (GOOD, bad, GOOD, [token], GOOD)]
            answers = [ask.result() for ask in asks]
            assert [status for status, _ in answers] == [200, 500, 200, 500, 200]
            assert all(json.loads(body)["choices"][0]["text"] == wanted for s, body in answers if s == 200)
            errors = [json.loads(body)["error"]["message"] for status, body in answers if status == 500]
            assert all("not numbers" in error for error in errors)
        assert server.metric("sps2:kv_blocks_leaked") == 0
