"""The Grafana dashboard: every query of it, asked of a real Prometheus that scraped the metrics by name."""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)

from megatron_sps2.server.metrics import Metrics

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "grafana"
DASHBOARD = json.loads((FOLDER / "sps2.json").read_text(encoding="utf-8"))
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
PROMETHEUS = shutil.which("prometheus")
SCRAPE_S = 1

COUNTERS: dict[str, tuple[str, ...]] = {
    "prompt_tokens": (),
    "generation_tokens": (),
    "request_success": ("finished_reason",),
    "num_preemptions": (),
    "prefix_cache_queries": (),
    "prefix_cache_hits": (),
    "bytes_sent": ("rank", "collective"),
    "prefill_pauses": (),
    "http_requests": ("route", "code"),
    "requests_refused": ("reason",),
    "engine_steps": (),
}
GAUGES: dict[str, tuple[str, ...]] = {
    "num_requests_running": (),
    "num_requests_waiting": (),
    "num_prefills_paused": (),
    "kv_cache_usage_perc": (),
    "kv_blocks_leaked": ("rank",),
    "kv_blocks_used": ("rank",),
    "kv_blocks_total": ("rank",),
    "rank_up": ("rank",),
    "rank_beat_age_seconds": ("rank",),
    "process_resident_memory_bytes": ("rank",),
}
HISTOGRAMS = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "csa_density",
    "csa_kept_mass",
)
VALUES = {
    "finished_reason": ("stop", "length", "abort"),
    "rank": ("0", "1"),
    "collective": ("all_to_all", "all_gather"),
    "route": ("/v1/completions", "/live"),
    "code": ("200",),
    "reason": ("queue_full", "draining"),
}


def expressions() -> list[tuple[str, str]]:
    return [(panel["title"], target["expr"]) for panel in PANELS for target in panel["targets"]]


class Exporter:
    """Metrics of these names that grow a little at each `tick`; those of ranks and of HTTP know no model."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.counters = [self._all(Counter, name, labels) for name, labels in COUNTERS.items()]
        self.gauges = [self._all(Gauge, name, labels) for name, labels in GAUGES.items()]
        self.histograms = [self._all(Histogram, name, ()) for name in HISTOGRAMS]

    def _all(self, kind: Any, name: str, labels: tuple[str, ...]) -> list[Any]:
        model = () if {"rank", "route", "reason"} & set(labels) else ("model_name",)
        metric = kind(f"sps2:{name}", name, (*model, *labels), registry=self.registry)
        rows: list[dict[str, str]] = [dict.fromkeys(model, "tiny")]
        for label in labels:
            rows = [{**row, label: value} for row in rows for value in VALUES[label]]
        return [metric.labels(**row) for row in rows]

    def tick(self, i: int) -> None:
        for metric in sum(self.counters, []):
            metric.inc(5 + i % 3)
        for metric in sum(self.gauges, []):
            metric.set(1)
        for metric in sum(self.histograms, []):
            metric.observe(0.1 + 0.8 * (i % 10) / 10)


@contextmanager
def serve(registry: CollectorRegistry) -> Iterator[int]:
    """The port of a server that answers in Prometheus's text format, whatever it is asked for.

    prometheus_client's own server answers a Prometheus in OpenMetrics, and writes `sps2_` for `sps2:` there.
    """

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:  # noqa: N802
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE_LATEST)
            self.end_headers()
            self.wfile.write(generate_latest(registry))

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def ask(base_url: str, path: str, **params: Any) -> Any:
    url = f"{base_url}/api/v1/{path}?{urllib.parse.urlencode(params)}"
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return json.load(answer)["data"]
    except urllib.error.HTTPError as error:
        raise ValueError(error.read().decode()) from error


def as_grafana_asks(expr: str) -> str:
    """With the variables filled in: one model, and a rate over what was scraped so far."""
    return expr.replace("$model_name", "tiny").replace("$__rate_interval", f"{6 * SCRAPE_S}s")


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a Prometheus that has scraped an exporter a few times."""
    if PROMETHEUS is None:
        pytest.skip("prometheus is not on this machine")
    folder, exporter, port = tmp_path_factory.mktemp("prometheus"), Exporter(), free_port()
    exporter.tick(0)
    with serve(exporter.registry) as metrics_port:
        config = (FOLDER / "prometheus.yml").read_text(encoding="utf-8")
        config = config.replace("127.0.0.1:8000", f"127.0.0.1:{metrics_port}").replace("5s", f"{SCRAPE_S}s")
        (folder / "prometheus.yml").write_text(config, encoding="utf-8")
        with run_prometheus(folder, port) as base_url:
            for i in range(1, 120):
                exporter.tick(i)
                time.sleep(0.25)
                if num_scrapes(base_url) >= 6:  # enough for a rate
                    break
            else:
                raise RuntimeError((folder / "log").read_text())
            yield base_url


@contextmanager
def run_prometheus(folder: Path, port: int) -> Iterator[str]:
    assert PROMETHEUS is not None
    flags = (
        f"--config.file={folder}/prometheus.yml",
        f"--storage.tsdb.path={folder}/data",
        f"--web.listen-address=127.0.0.1:{port}",
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen((PROMETHEUS, *flags), stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def num_scrapes(base_url: str) -> int:
    """That found something; 0 while Prometheus starts."""
    try:
        found = ask(base_url, "query", query="count_over_time(sps2:rank_up[1m])")["result"]
    except (OSError, ValueError):
        return 0
    return int(found[0]["value"][1]) if found else 0


@pytest.mark.parametrize(("title", "expr"), expressions(), ids=lambda text: text.split("{")[0])
def test_every_query_has_an_answer(prometheus: str, title: str, expr: str) -> None:
    result = ask(prometheus, "query", query=as_grafana_asks(expr))["result"]
    values = [float(series["value"][1]) for series in result]
    assert values and all(math.isfinite(value) for value in values), (title, values)
    if "percentunit" in json.dumps([panel for panel in PANELS if panel["title"] == title]):
        assert all(0 <= value <= 1 for value in values)


def test_legends_name_labels_that_the_answers_have(prometheus: str) -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            result = ask(prometheus, "query", query=as_grafana_asks(target["expr"]))["result"]
            for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
                assert all(label in series["metric"] for series in result), panel["title"]


def test_the_model_variable_finds_the_model(prometheus: str) -> None:
    [query] = [v["query"]["query"] for v in DASHBOARD["templating"]["list"] if v["name"] == "model_name"]
    metric, label = re.fullmatch(r"label_values\((\S+), (\w+)\)", query).groups()  # type: ignore[union-attr]
    assert ask(prometheus, f"label/{label}/values", **{"match[]": metric}) == ["tiny"]


def test_control_a_query_of_an_unknown_metric_or_with_a_slip_is_found(prometheus: str) -> None:
    assert not ask(prometheus, "query", query=as_grafana_asks("sum(sps2:rank_upp)"))["result"]
    with pytest.raises(ValueError, match="parse error"):
        ask(prometheus, "query", query="sum(sps2:rank_up")


def test_server_tells_every_metric_that_is_shown() -> None:
    told = set(re.findall(r"^# TYPE sps2:(\w+)", Metrics("tiny").text().decode(), re.MULTILINE))
    assert {f"{name}_total" for name in COUNTERS} | set(GAUGES) | set(HISTOGRAMS) <= told


def test_dashboard_shows_every_metric() -> None:
    shown = set(re.findall(r"sps2:(\w+)", " ".join(expr for _, expr in expressions())))
    buckets = {f"{name}_bucket" for name in HISTOGRAMS}
    assert shown == {f"{name}_total" for name in COUNTERS} | set(GAUGES) | buckets


def test_panels_do_not_overlap_and_share_the_variables() -> None:
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        at = panel["gridPos"]
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken and at["x"] + at["w"] <= 24, panel["title"]
        taken |= cells
    for panel in PANELS:
        assert panel["description"] and panel["datasource"]["uid"] == "${datasource}"
        assert all('{model_name=~"$model_name' in target["expr"] for target in panel["targets"])
