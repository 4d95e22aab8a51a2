"""The live page in a real browser, beside a server that plays a script: what it shows, sends and survives."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from tests.browser import (
    ask,
    attributes,
    browse,
    check_page,
    console_errors,
    drawn_bars,
    find,
    has_answered,
    needs_chromium,
    text,
    texts,
    wait_until,
)

pytestmark = needs_chromium

PAGE = Path(__file__).resolve().parent.parent / "megatron_sps2" / "server" / "page.html"
HOSTILE = "<img src=x onerror='window.stolen=1'><script>window.stolen=1</script>"
NUM_RANKS, NUM_LAYERS = 4, 24


def steps_of(rank: int, since: float, now: float) -> list[dict[str, Any]]:
    """Every 400 ms two layers of one of two long prompts, then four decode steps."""
    common = {"rank": rank, "num_decodes": 0, "num_prompt_tokens": 0, "first_layer": 0, "last_layer": 0}
    steps: list[dict[str, Any]] = []
    for period in range(int((now - 11) / 0.4), int(now / 0.4) + 1):
        start, layer = period * 0.4, 2 * (period // 2 % (NUM_LAYERS // 2))
        piece = {"first_layer": layer, "last_layer": layer + 2, "num_prompt_tokens": 512}
        prefill = {"kind": "prefill", "start": start, "seconds": 0.32, "requests": [7 + period % 2]}
        steps.append({**common, **piece, **prefill})
        decode = {"kind": "decode", "seconds": 0.018, "requests": [3, 4], "num_decodes": int(rank < 3)}
        steps += [{**common, **decode, "start": start + 0.32 + 0.02 * i} for i in range(4)]
    return [step for step in steps if since < step["start"] < now - step["seconds"]]


def live(since: float) -> dict[str, Any]:
    now = time.time()
    return {
        "state": "serving",
        "model": "tiny-llama",
        "policy": "sps2",
        "now": now,
        "ranks": [
            {
                "rank": rank,
                "replica": 0,
                "sp_rank": rank,
                "tp_rank": 0,
                "host": "node-a",
                "beat_age_s": 0.2 + 4 * (rank == 3),
                "kv_used_blocks": 250 * (rank + 1),
                "kv_total_blocks": 2000,
                "rss_bytes": (900 + rank) << 20,
            }
            for rank in range(NUM_RANKS)
        ],
        "requests": [
            {
                "id": number,
                "state": "running" if number < 5 else "waiting",
                "num_prompt_tokens": 1000 * number,
                "num_generated": 12 if number < 5 else 0,
                "age_s": 1.5 * number,
                "ttft_ms": 321.5 if number < 5 else None,
            }
            for number in (3, 4, 7, 8)
        ],
        "num_waiting": 2,
        "num_running": 2,
        "num_prefilling": 1,
        "num_paused": 1,
        "tokens_per_s": {"prompt": 5120.0, "generation": 20.5 + now % 7},
        "ttft_ms": {"p50": 321.5, "p99": 1890.0},
        "tbt_ms": {"p50": 98.0, "p99": 104.2},
        "steps": [step for rank in range(NUM_RANKS) for step in steps_of(rank, since, now)],
    }


def sse(*events: Any) -> list[bytes]:
    return [
        f"data: {event if isinstance(event, str) else json.dumps(event)}\n\n".encode() for event in events
    ]


def chunk(content: str, **more: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": None, **more}]}


def one_word_at_a_time(*words: str) -> Iterator[bytes]:
    yield from sse({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
    for word in words:
        yield from sse(chunk(word))
        time.sleep(0.03)
    usage = {"choices": [], "usage": {"completion_tokens": len(words)}}
    yield from sse(chunk("", finish_reason="length"), usage, "[DONE]")


@dataclass
class Script:
    """What the server answers; a test replaces parts. `asked` are the POSTs: path, Authorization, body."""

    page: Callable[[], str] = lambda: PAGE.read_text(encoding="utf-8")
    live: Callable[[float], Any] = live
    status: int = 200
    refusal: Any = None
    refused_path: str = "/v1/chat/completions"
    stream: Callable[[], Iterator[bytes]] = lambda: one_word_at_a_time("one", " two", " three")
    asked: list[tuple[str, str | None, dict[str, Any]]] = field(default_factory=list)
    polled: list[tuple[float, str | None]] = field(default_factory=list)
    closed: threading.Event = field(default_factory=threading.Event)  # the browser hung up


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A connection that breaks is part of some scripts."""


@contextmanager
def play(script: Script) -> Iterator[str]:
    """The base URL of a server that plays `script`."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def send(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:  # noqa: N802
            url = urlsplit(self.path)
            if url.path == "/":
                return self.send(200, "text/html; charset=utf-8", script.page().encode())
            assert url.path == "/live", url
            since = float(parse_qs(url.query)["since"][0])
            script.polled.append((since, self.headers["Authorization"]))
            self.send(200, "application/json", json.dumps(script.live(since)).encode())

        def do_POST(self) -> None:  # noqa: N802
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            script.asked.append((self.path, self.headers["Authorization"], body))
            if script.status != 200 and self.path == script.refused_path:
                return self.send(script.status, "application/json", json.dumps(script.refusal).encode())
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            try:
                for data in script.stream():
                    self.wfile.write(data)
                    self.wfile.flush()
            except OSError:
                script.closed.set()

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    with browse(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(autouse=True)
def left_clean(driver: webdriver.Chrome) -> Iterator[None]:
    """No test leaves an error in the console, nor a page that polls a server which is gone."""
    console_errors(driver)
    yield
    errors = console_errors(driver)
    driver.get("about:blank")
    assert not errors, errors


def open_page(driver: webdriver.Chrome, base_url: str, state: str = "serving") -> None:
    driver.get(base_url)
    wait_until(driver, lambda: text(driver, "#state") == state, f"the state {state} is shown")


def test_page_shows_what_the_server_does(driver: webdriver.Chrome) -> None:
    with play(Script()) as base_url:
        open_page(driver, base_url)
        assert text(driver, "#model") == "tiny-llama" and text(driver, "#policy") == "policy sps2"
        assert not find(driver, "#banner").is_displayed()
        tiles = dict(zip(texts(driver, "#tiles dt"), texts(driver, "#tiles dd"), strict=True))
        assert tiles["Running"] == "2" and tiles["Waiting"] == "2" and tiles["Prefilling / paused"] == "1 / 1"
        assert tiles["Prompt tokens/s"] == "5,120" and tiles["TTFT p50 / p99"] == "322 ms / 1.89 s"
        assert tiles["TBT p50 / p99"] == "98 ms / 104 ms"
        assert attributes(driver, "[role=meter]", "aria-valuenow") == ["13", "25", "38", "50"]
        assert "1,000 / 2,000" in text(driver, "#ranks tr:last-child")
        assert texts(driver, "#ranks .late") == ["4.2 s ago"]
        rows = texts(driver, "#requests tr")
        assert rows == [
            "3running3,000124.5 s322 ms",
            "4running4,000126.0 s322 ms",
            "7waiting7,000010.5 s–",
            "8waiting8,000012.0 s–",
        ]


def test_timeline_has_a_lane_per_rank_with_every_prefill_piece_and_decode_step(
    driver: webdriver.Chrome,
) -> None:
    with play(Script()) as base_url:
        open_page(driver, base_url)
        wait_until(driver, lambda: len(drawn_bars(driver)) == NUM_RANKS, "a lane for each rank")
        for bars in drawn_bars(driver).values():
            assert bars["prefill"] == pytest.approx(25, abs=1) and bars["decode"] == pytest.approx(100, abs=4)
        assert {"0–1", "22–23"} <= set(texts(driver, "#timeline .layers"))
        fills = "return [...document.querySelectorAll('.lane path')].map((p) => getComputedStyle(p).fill)"
        assert len(set(driver.execute_script(fills))) == 3  # two requests and decode
        assert find(driver, ".lane[data-rank='3'] .decode.faint") and not texts(
            driver, ".lane[data-rank='0'] .faint"
        )


def chunked(since: float, num_ranks: int = 2) -> dict[str, Any]:
    """What a policy does that mixes: each step a chunk of a prompt through all layers, and decodes."""
    told = live(since)
    common = {"kind": "mixed", "first_layer": 0, "last_layer": NUM_LAYERS, "seconds": 0.24, "num_decodes": 2}
    steps = [
        {
            **common,
            "rank": rank,
            "start": told["now"] - 10 + i / 4,
            "num_prompt_tokens": 64,
            "requests": [i, 3],
        }
        for rank in range(num_ranks)
        for i in range(39)
    ]
    ranks = [{**told["ranks"][0], "rank": rank} for rank in range(num_ranks)]
    return {**told, "ranks": ranks, "steps": steps}


def test_a_mixed_step_is_drawn_as_both(driver: webdriver.Chrome) -> None:
    with play(Script(live=chunked)) as base_url:
        open_page(driver, base_url)
        bars = drawn_bars(driver)
        assert len(bars) == 2 and all(lane["prefill"] == lane["decode"] >= 38 for lane in bars.values())


def test_each_step_is_drawn_once_however_often_the_server_tells_it(driver: webdriver.Chrome) -> None:
    script = Script(live=lambda since: live(since - 3))
    with play(script) as base_url:
        open_page(driver, base_url)
        wait_until(driver, lambda: len(script.polled) > 4, "some polls")
        assert all(bars["decode"] == pytest.approx(100, abs=4) for bars in drawn_bars(driver).values())
        now = time.time()
        assert script.polled[0][0] == 0 and all(now - 6 < since < now for since, _ in script.polled[1:])


def test_steps_in_memory_are_bounded(driver: webdriver.Chrome) -> None:
    def flood(since: float) -> dict[str, Any]:
        told = live(since)
        return {
            **told,
            "steps": [
                {**told["steps"][1], "start": told["now"] - 11 + i / 1000, "seconds": 0.001, "rank": 0}
                for i in range(11000)
            ],
        }

    with play(Script(live=flood)) as base_url:
        open_page(driver, base_url)
        assert driver.execute_script("return steps.get(0).length") == 4000
        assert drawn_bars(driver)[0]["decode"] > 3900


@pytest.mark.parametrize("where", ["pointer", "keyboard"])
def test_a_step_tells_of_itself(driver: webdriver.Chrome, where: str) -> None:
    with play(Script()) as base_url:
        open_page(driver, base_url)
        wait_until(driver, lambda: drawn_bars(driver), "a timeline")
        if where == "pointer":
            ActionChains(driver).move_to_element(find(driver, ".lane[data-rank='1'] .track")).perform()
        else:
            find(driver, "#chart").send_keys(Keys.ARROW_LEFT, Keys.ARROW_DOWN, Keys.ARROW_LEFT)
        wait_until(driver, lambda: find(driver, "#tip").is_displayed(), "details")
        assert text(driver, "#tip").startswith("rank 1: ")
        assert any(
            what in text(driver, "#tip") for what in ("prompt tokens here: 512", "answers decoded here: 1")
        )
        before = text(driver, "#timeline")
        time.sleep(0.7)
        assert find(driver, "#tip").is_displayed() and text(driver, "#timeline") == before  # held
        if where == "pointer":
            ActionChains(driver).move_to_element(find(driver, "h1")).perform()
        else:
            find(driver, "#chart").send_keys(Keys.ESCAPE)
        wait_until(driver, lambda: text(driver, "#timeline") != before, "the picture goes on")
        assert not find(driver, "#tip").is_displayed()


def test_an_answer_streams_into_the_page(driver: webdriver.Chrome) -> None:
    go_on = threading.Event()

    def stream() -> Iterator[bytes]:
        first, *rest = one_word_at_a_time("one", " two", " three")
        yield first + rest[0][:9]  # the network cuts where it likes
        yield rest[0][9:]
        assert go_on.wait(10)
        yield from rest[1:]

    script = Script(stream=stream)
    with play(script) as base_url:
        open_page(driver, base_url)
        ask(driver, "Count.", max_tokens=3)
        wait_until(
            driver, lambda: text(driver, "#answer") == "one", "the first word, before there is a second"
        )
        assert not find(driver, "#send").is_enabled()
        go_on.set()
        wait_until(driver, lambda: has_answered(driver), "the answer ends")
        assert text(driver, "#answer") == "one two three" and not find(driver, "#trouble").is_displayed()
        timing = text(driver, "#timing")
        assert timing.startswith("TTFT ") and "TBT " in timing and "3 tokens · ended by length" in timing
        [(path, key, body)] = script.asked
        assert path == "/v1/chat/completions" and key is None
        assert body["messages"] == [{"role": "user", "content": "Count."}]
        assert body["model"] == "tiny-llama" and body["max_tokens"] == 3 and body["stream"] is True


def test_ctrl_enter_sends_a_completion(driver: webdriver.Chrome) -> None:
    script = Script(stream=lambda: iter(sse({"choices": [{"text": "Paris"}]}, "[DONE]")))
    with play(script) as base_url:
        open_page(driver, base_url)
        driver.execute_script("document.getElementById('mode').value = 'completion'")
        find(driver, "#prompt").send_keys("The capital is", Keys.CONTROL + Keys.ENTER)
        wait_until(driver, lambda: text(driver, "#answer") == "Paris", "the answer")
        assert script.asked[0][0] == "/v1/completions" and script.asked[0][2]["prompt"] == "The capital is"


def test_stop_hangs_up(driver: webdriver.Chrome) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(500):
            yield from sse(chunk("more "))
            time.sleep(0.02)

    script = Script(stream=endless)
    with play(script) as base_url:
        open_page(driver, base_url)
        ask(driver, "Talk.")
        wait_until(driver, lambda: "more more" in text(driver, "#answer"), "some answer")
        find(driver, "#stop").click()
        assert script.closed.wait(5)
        wait_until(driver, lambda: has_answered(driver), "the page is ready again")
        assert text(driver, "#timing").endswith("stopped") and not text(driver, "#trouble")


def test_an_error_is_shown(driver: webdriver.Chrome) -> None:
    script = Script(status=400, refusal={"error": {"message": "max_tokens=8 is more than the model has"}})
    with play(script) as base_url:
        open_page(driver, base_url)
        ask(driver, "Hello")
        wait_until(
            driver, lambda: text(driver, "#trouble") == "max_tokens=8 is more than the model has", "the error"
        )
        assert has_answered(driver) and len(script.asked) == 1


def test_an_error_in_the_middle_of_an_answer_is_shown(driver: webdriver.Chrome) -> None:
    script = Script(stream=lambda: iter(sse(chunk("so far"), {"error": {"message": "rank 1 is lost"}})))
    with play(script) as base_url:
        open_page(driver, base_url)
        ask(driver, "Hello")
        wait_until(driver, lambda: text(driver, "#trouble") == "rank 1 is lost", "the error")
        assert text(driver, "#answer") == "so far"


def test_without_a_chat_template_a_completion_is_asked_for(driver: webdriver.Chrome) -> None:
    refusal = {"error": {"message": "The checkpoint has no chat template."}}
    with play(Script(status=400, refusal=refusal)) as base_url:
        open_page(driver, base_url)
        ask(driver, "Hello")
        wait_until(driver, lambda: has_answered(driver) and text(driver, "#answer"), "the answer")
        assert text(driver, "#answer") == "one two three"
        assert (
            text(driver, "#trouble") == "The checkpoint has no chat template. Sent as a completion instead."
        )


@pytest.mark.parametrize(
    ("state", "said", "level"),
    [("lost", "lost a rank", "bad"), ("draining", "draining", "warn"), ("starting", "starting", "warn")],
)
def test_a_server_that_does_not_serve_has_a_banner(
    driver: webdriver.Chrome, state: str, said: str, level: str
) -> None:
    with play(Script(live=lambda since: {**live(since), "state": state})) as base_url:
        open_page(driver, base_url, state)
        banner = find(driver, "#banner")
        assert banner.is_displayed() and said in banner.text and banner.get_attribute("data-level") == level


def test_a_server_that_went_away_has_a_banner_until_it_is_back(driver: webdriver.Chrome) -> None:
    gone = threading.Event()

    def dies(since: float) -> dict[str, Any]:
        if gone.is_set():
            raise ConnectionError
        return live(since)

    script = Script(live=dies)
    with play(script) as base_url:
        open_page(driver, base_url)
        gone.set()
        wait_until(driver, lambda: text(driver, "#state") == "unreachable", "the state")
        assert "cannot be reached" in find(driver, "#banner").text
        gone.clear()
        wait_until(driver, lambda: text(driver, "#state") == "serving", "the server is back")
        assert not find(driver, "#banner").is_displayed()


def test_hostile_text_stays_text(driver: webdriver.Chrome) -> None:
    def hostile(since: float) -> dict[str, Any]:
        told = live(since)
        request, rank, step = told["requests"][0], told["ranks"][0], told["steps"][-1]
        more = {
            "requests": [{**request, "id": HOSTILE, "state": HOSTILE}],
            "ranks": [{**rank, "host": HOSTILE}],
        }
        return {
            **told,
            **more,
            "model": HOSTILE,
            "policy": HOSTILE,
            "steps": [{**step, "kind": HOSTILE, "requests": [HOSTILE]}],
        }

    script = Script(live=hostile, stream=lambda: one_word_at_a_time(HOSTILE))
    with play(script) as base_url:
        open_page(driver, base_url)
        ask(driver, HOSTILE)
        wait_until(driver, lambda: has_answered(driver) and text(driver, "#answer"), "the answer")
        script.status, script.refusal = 400, {"error": {"message": HOSTILE}}
        assert text(driver, "#answer") == HOSTILE == text(driver, "#model")
        ask(driver, HOSTILE)
        wait_until(driver, lambda: text(driver, "#trouble") == HOSTILE, "the error")
        find(driver, "#chart").send_keys(Keys.ARROW_LEFT)
        assert HOSTILE in text(driver, "#tip") and HOSTILE in text(driver, "#requests")
        assert driver.execute_script("return window.stolen") is None
        assert not driver.find_elements("css selector", "img, main script")


@pytest.mark.parametrize(
    "told",
    [
        {},
        None,
        {
            "state": "serving",
            "ranks": [{}, None, 3],
            "requests": [{}],
            "steps": [{}, None, {"rank": 0}],
            "now": "x",
        },
        {
            "state": 5,
            "ranks": {},
            "requests": 1,
            "steps": "s",
            "tokens_per_s": None,
            "ttft_ms": {"p50": None},
        },
        {"now": 1.0, "steps": [{"rank": 0, "start": 0.5, "seconds": 0.1, "kind": "prefill"}]},
    ],
)
def test_missing_and_odd_fields_are_dashes(driver: webdriver.Chrome, told: Any) -> None:
    script = Script(live=lambda _: told)
    with play(script) as base_url:
        driver.get(base_url)
        wait_until(driver, lambda: len(script.polled) > 1, "it polls on")
        assert text(driver, "#state") not in ("connecting", "unreachable")
        assert texts(driver, "#tiles dd")[0] == "–"


def test_the_key_goes_with_every_request_and_stays_in_the_tab(driver: webdriver.Chrome) -> None:
    script = Script()
    with play(script) as base_url:
        open_page(driver, base_url)
        assert script.polled[0][1] is None
        find(driver, "#key").send_keys("a-secret", Keys.TAB)
        ask(driver, "Hello")
        wait_until(driver, lambda: has_answered(driver) and text(driver, "#answer"), "the answer")
        assert script.asked[0][1] == "Bearer a-secret"
        wait_until(driver, lambda: script.polled[-1][1] == "Bearer a-secret", "a poll with the key")
        assert driver.execute_script("return [localStorage.length, document.cookie]") == [0, ""]
        driver.refresh()
        wait_until(driver, lambda: text(driver, "#state") == "serving", "the page is back")
        assert find(driver, "#key").get_attribute("value") == "a-secret"


def test_everything_that_takes_input_has_a_name(driver: webdriver.Chrome) -> None:
    with play(Script()) as base_url:
        open_page(driver, base_url)
        inputs = driver.find_elements("css selector", "input, textarea, select, button, [tabindex]")
        assert len(inputs) >= 8 and all(element.accessible_name for element in inputs)


def test_page_needs_nothing_from_elsewhere() -> None:
    page = PAGE.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
    assert not [
        word
        for word in ("http:", "https:", "//cdn", "innerHTML", "insertAdjacentHTML", "eval(")
        if word in page
    ]


def test_check_page_passes_beside_the_script(driver: webdriver.Chrome) -> None:
    with play(Script()) as base_url:
        check_page(driver, base_url, num_ranks=NUM_RANKS)


@pytest.mark.parametrize(
    ("line", "planted", "what"),
    [
        ("  drawTimeline();\n", "", "prefill and decode"),
        ('add("prefill", fill,', '(() => {})("prefill", fill,', "prefill and decode"),
        ("  showRanks(list(data.ranks));\n", "", "a KV bar"),
        ('$("answer").append(String(piece));', "", "the answer is empty"),
        ("  showTiles(data);\n", "  showTiles(null);\n", "the state"),
    ],
)
def test_control_a_page_that_shows_less_is_found(
    driver: webdriver.Chrome, monkeypatch: pytest.MonkeyPatch, line: str, planted: str, what: str
) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert line in page
    monkeypatch.setattr("tests.browser.PATIENCE_S", 1.2)
    with (
        play(Script(page=lambda: page.replace(line, planted))) as base_url,
        pytest.raises((TimeoutException, AssertionError), match=what),
    ):
        check_page(driver, base_url, num_ranks=NUM_RANKS)
