"""The front end: one request's text never holds up its event loop, which carries all streams; its signals."""

from __future__ import annotations

import asyncio
import threading
from types import SimpleNamespace
from typing import Any, NoReturn

import httpx2
import pytest

from megatron_sps2.server import chat, completions, front_end
from megatron_sps2.server.app import make_app
from megatron_sps2.server.errors import ApiError
from megatron_sps2.server.front_end_config import FrontEndConfig
from megatron_sps2.server.metrics import Metrics
from megatron_sps2.server.protocol import Endpoints
from megatron_sps2.server.service import Service


class SlowTokenizer:
    """Is through with a text when somebody says so."""

    bos_token_id = None

    def __init__(self) -> None:
        self.has_begun, self.may_end = threading.Event(), threading.Event()
        self.was_in_time = True

    def encode(self, text: str) -> list[int]:
        self.has_begun.set()
        self.was_in_time = self.may_end.wait(2)
        return [5]

    def encode_chat(self, messages: Any) -> list[int]:
        return self.encode("")

    def decode(self, ids: Any) -> str:
        return str(self.encode(""))


class FullEngine:
    """Knows the model and takes no request."""

    ready = SimpleNamespace(max_model_len=100, vocab_size=10)

    def check_room(self, count: int) -> NoReturn:
        raise ApiError(429, "full")


CONFIG = FrontEndConfig(
    host="", port=0, endpoints=Endpoints(engine="", beats=""), checkpoint="", served_model_name="m"
)


def service_of(tokenizer: SlowTokenizer) -> Service:
    client: Any = FullEngine()
    slow: Any = tokenizer
    return Service(config=CONFIG, client=client, metrics=Metrics("m"), tokenizer=slow)


async def ask_beside_a_long_text(method: str, path: str, body: dict[str, Any]) -> tuple[int, bool]:
    """The status of a request whose text takes long, and whether another one was answered meanwhile."""
    tokenizer = SlowTokenizer()
    transport = httpx2.ASGITransport(make_app(service_of(tokenizer)))
    async with httpx2.AsyncClient(transport=transport, base_url="http://sps2") as client:
        slow = asyncio.create_task(client.request(method, path, json=body))
        while not tokenizer.has_begun.is_set():
            await asyncio.sleep(0.001)
        assert (await client.get("/version")).status_code == 200
        tokenizer.may_end.set()
        return (await slow).status_code, tokenizer.was_in_time


MESSAGES = [{"role": "user", "content": "long"}]


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/v1/completions", {"prompt": "long"}, 429),
        ("POST", "/v1/chat/completions", {"messages": MESSAGES}, 429),
        ("PUT", "/api", {"prompts": ["long"], "tokens_to_generate": 1}, 429),
        ("POST", "/tokenize", {"prompt": "long"}, 200),
        ("POST", "/detokenize", {"tokens": [5]}, 200),
    ],
)
def test_others_are_answered_while_a_long_text_becomes_tokens(
    method: str, path: str, body: dict[str, Any], status: int
) -> None:
    assert asyncio.run(ask_beside_a_long_text(method, path, body)) == (status, True)


@pytest.mark.parametrize(
    ("module", "path", "body"),
    [
        (completions, "/v1/completions", {"prompt": "long"}),
        (chat, "/v1/chat/completions", {"messages": MESSAGES}),
    ],
)
def test_control_in_the_loop_a_long_text_holds_up_everybody(
    module: Any, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def in_the_loop(work: Any, *args: Any) -> Any:
        return work(*args)

    monkeypatch.setattr(module.asyncio, "to_thread", in_the_loop)
    assert asyncio.run(ask_beside_a_long_text("POST", path, body)) == (429, False)


@pytest.mark.parametrize(("one_signal_s", "wanted"), [(60.0, 1), (0.0, 2)], ids=["one wish", "control: two"])
def test_a_signal_that_comes_twice_at_once_is_one(
    monkeypatch: pytest.MonkeyPatch, one_signal_s: float, wanted: int
) -> None:
    """SLURM signals the front end, and rank 0, which passes it on; the second would cut the drain short."""
    monkeypatch.setattr(front_end, "ONE_SIGNAL_S", one_signal_s)

    async def signal_twice() -> int:
        found = front_end._FrontEnd(CONFIG)
        for _ in range(2):
            found._on_signal()
        return found._signals

    assert asyncio.run(signal_twice()) == wanted
