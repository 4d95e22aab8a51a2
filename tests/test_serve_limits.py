"""What the front end itself refuses, ends or shows, on a small server: queue, sizes, deadlines, fuzz."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from benchmarks.served import Server, serve
from tests.browser import browse, check_page, needs_chromium
from tests.sps2_command import make_checkpoint, words

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]

SEATS, QUEUE = 2, 3
MAX_BODY = 1 << 20
SPREAD = words(5 + i % 200 for i in range(700))  # long enough to lie on both ranks


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("limits"))


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    trace = tmp_path_factory.mktemp("trace") / "trace.json"
    seats = ("--max-num-seqs", SEATS, "--max-queue", QUEUE, "--max-body-mib", 1)
    with serve(checkpoint, "--sp", 2, *seats, "--served-model-name", "tiny", "--trace", trace) as server:
        spread = {"prompt": SPREAD, "max_tokens": 2}
        assert httpx2.post(f"{server.base_url}/v1/completions", json=spread, timeout=60).status_code == 200
        yield server
        assert server.end() == 0
        assert "Traceback" not in server.log.read_text()
        check_trace(json.loads(trace.read_text()))


def check_trace(trace: dict[str, Any]) -> None:
    """Both ranks' steps, layers and collectives, as the trace viewer reads them."""
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    for rank in (0, 1):
        tracks = {event["cat"] for event in events if event["pid"] == rank}
        assert tracks == {"steps", "layers", "collectives"}, tracks
    names = {event["name"] for event in events}
    assert {"prefill", "decode", "layer 0", "layer 5", "gather_queries"} <= names, names
    assert all(event["dur"] >= 0 and event["ts"] > 0 for event in events)


@pytest.fixture
def client(server: Server) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=server.base_url, timeout=60) as client:
        yield client


def body(num_tokens: int = 8, **more: Any) -> dict[str, Any]:
    return {"prompt": words(range(5, 15)), "max_tokens": num_tokens, "ignore_eos": True, **more}


def await_idle(server: Server) -> None:
    end = time.monotonic() + 20
    while server.json("/live")["requests"] or server.metric("sps2:kv_blocks_used"):
        assert time.monotonic() < end, server.json("/live")
        time.sleep(0.1)


def test_a_full_queue_answers_429_and_says_when_to_come_back(server: Server, client: httpx2.Client) -> None:
    with ThreadPoolExecutor(SEATS + QUEUE) as pool:
        held = [
            pool.submit(client.post, "/v1/completions", json=body(9000, timeout=12))
            for _ in range(SEATS + QUEUE)
        ]
        end = time.monotonic() + 10
        while len(server.json("/live")["requests"]) < SEATS + QUEUE:
            assert time.monotonic() < end, server.json("/live")
            time.sleep(0.05)
        refused = client.post("/v1/completions", json=body())
        assert refused.status_code == 429 and int(refused.headers["Retry-After"]) >= 1, refused.text
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert {each.result().status_code for each in held} == {504}
    await_idle(server)
    assert client.post("/v1/completions", json=body()).status_code == 200


def test_a_deadline_ends_a_stream_with_an_error_event(server: Server, client: httpx2.Client) -> None:
    reply = client.post("/v1/completions", json=body(5000, stream=True, timeout=0.5))
    events = [line for line in reply.text.splitlines() if line]
    assert reply.status_code == 200 and len(events) > 2
    assert json.loads(events[-1].removeprefix("data: "))["error"]["type"] == "timeout_error"
    await_idle(server)


def test_a_client_that_goes_away_frees_its_blocks(server: Server, client: httpx2.Client) -> None:
    """At each of its first events, and while it waits for the whole answer."""
    for num_lines in range(1, 7):
        with (
            httpx2.Client(base_url=server.base_url, timeout=60) as leaving,
            leaving.stream("POST", "/v1/completions", json=body(9000, stream=True, n=2)) as reply,
        ):
            for _, line in zip(range(num_lines), reply.iter_lines(), strict=False):
                assert "error" not in line
        await_idle(server)
    with httpx2.Client(base_url=server.base_url, timeout=0.7) as hasty, pytest.raises(httpx2.ReadTimeout):
        hasty.post("/v1/completions", json=body(9000, n=2))
    await_idle(server)
    assert server.metric("sps2:kv_blocks_leaked") == 0


def test_control_a_client_that_stays_keeps_its_blocks(server: Server, client: httpx2.Client) -> None:
    with ThreadPoolExecutor(1) as pool:
        held = pool.submit(client.post, "/v1/completions", json=body(9000, timeout=3))
        time.sleep(1.5)
        assert server.metric("sps2:kv_blocks_used") > 0
        assert held.result().status_code == 504


def test_an_abort_ends_an_answer_by_its_id(server: Server, client: httpx2.Client) -> None:
    with client.stream("POST", "/v1/completions", json=body(9000, stream=True)) as reply:
        lines = (line for line in reply.iter_lines() if line)
        name = json.loads(next(lines).removeprefix("data: "))["id"]
        assert reply.headers["X-Request-Id"] == name
        assert client.post("/abort", json={"request_id": name}).status_code == 200
        rest = list(lines)
    assert rest[-1] == "data: [DONE]" and '"finish_reason":"abort"' in rest[-2]
    assert client.post("/abort", json={"request_id": name}).status_code == 404


def test_bodies_are_bounded_whether_they_tell_their_size_or_not(client: httpx2.Client) -> None:
    large = b'{"prompt": "' + b"w5 " * MAX_BODY + b'"}'
    headers = {"Content-Type": "application/json"}
    assert client.post("/v1/completions", content=large, headers=headers).status_code == 413
    chunks = (large[i : i + 65536] for i in range(0, len(large), 65536))
    assert client.post("/v1/completions", content=chunks, headers=headers).status_code == 413


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"prompt": "\\ud800"}',
        b'{"prompt": ["w5", "\\udfff"]}',
        b'{"prompt": "w5", "stop": "\\ud83d"}',
        b'{"prompt": "w5", "temperature": NaN}',
        b'{"prompt": "w5", "temperature": 1e999}',
        b'{"prompt": "w5", "seed": 1e30}',
        b'{"prompt": "w5", "seed": 99999999999999999999999}',
        b'{"prompt": "w5", "logit_bias": {"5": 1}}',
        b'{"prompt": "w5", "presence_penalty": 1}',
        b'{"prompt": "w5", "best_of": 3}',
        b'{"prompt": "w5", "stream_options": {"include_usage": true}}',
        b'{"prompt": "w5", "min_tokens": 20, "max_tokens": 3}',
        b'{"prompt": "w5", "n": 129}',
        b'{"prompt": [[]]}',
        b'{"prompt": [-1]}',
        b'\xff\xfe{"prompt": "w5"}',
    ],
)
def test_what_is_no_request_is_400_with_a_reason(client: httpx2.Client, content: bytes) -> None:
    reply = client.post("/v1/completions", content=content, headers={"Content-Type": "application/json"})
    assert reply.status_code == 400 and reply.json()["error"]["message"], reply.text


def test_chats_refuse_what_they_would_otherwise_ignore(client: httpx2.Client) -> None:
    message = {"messages": [{"role": "user", "content": "w5"}], "max_tokens": 2}
    assert client.post("/v1/chat/completions", json=message).status_code == 200
    for more in (
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
        {"top_logprobs": 2},
        {"messages": []},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
    ):
        assert client.post("/v1/chat/completions", json=message | more).status_code == 400, more


def test_tokens_go_both_ways(client: httpx2.Client) -> None:
    found = client.post("/tokenize", json={"prompt": "w5 w6"}).json()
    assert found == {"count": 2, "max_model_len": 16384, "tokens": [5, 6]}
    assert client.post("/detokenize", json={"tokens": [5, 6]}).json() == {"prompt": "w5 w6"}
    chat = client.post("/tokenize", json={"messages": [{"role": "user", "content": "w9"}]}).json()
    assert chat["tokens"] == [3, 9, 4]
    assert client.post("/detokenize", json={"tokens": [999]}).status_code == 400
    assert (
        client.get("/version").json()["version"]
        and client.get("/v1/models").json()["data"][0]["id"] == "tiny"
    )


def shorten(request: dict[str, Any]) -> None:
    """An answer that may go on to the end of the model's context takes longer than a fuzzer waits."""
    for prompt, limit in (
        ("prompt", "max_tokens"),
        ("messages", "max_tokens"),
        ("prompts", "tokens_to_generate"),
    ):
        asked = request.get(limit)
        if prompt in request and (asked is None or (isinstance(asked, int) and asked > 16)):
            request[limit] = 16


def fuzz(operation: Any) -> set[int]:
    """The statuses of 12 requests that fit one operation's schema, or nearly do."""
    seen: set[int] = set()

    @settings(
        max_examples=12,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def attempt(case: Any) -> None:
        if isinstance(case.body, dict):
            shorten(case.body)
        seen.add(case.call(timeout=30).status_code)

    attempt()
    return seen


def test_fuzzed_bodies_never_make_a_server_error(server: Server) -> None:
    """Schemathesis against the server's own OpenAPI document; 503 and 504 are not expected either."""
    schema = schemathesis.openapi.from_url(f"{server.base_url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    statuses = {f"{each.method.upper()} {each.path}": fuzz(each) for each in operations}
    assert len(statuses) >= 11, statuses
    assert not any(code >= 500 for codes in statuses.values() for code in codes), statuses
    assert 400 in statuses["POST /v1/completions"], statuses


@needs_chromium
def test_the_live_page_shows_the_real_server(server: Server, tmp_path: Path) -> None:
    with browse(tmp_path) as driver:
        check_page(driver, server.base_url, num_ranks=2, prompt=SPREAD)
