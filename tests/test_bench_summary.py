"""From records to numbers, each beside numpy by hand; the search for a capacity on a formula."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_sps2.bench.capacity import SearchConfig, Try, best, missed, parse_limits, search, worst
from megatron_sps2.bench.figures import distributions, load_curves, throughput, timeline
from megatron_sps2.bench.record import Record
from megatron_sps2.bench.report import document, latency_rows, page, throughput_rows, write_json
from megatron_sps2.bench.summary import parse_slos, per_request, summarize


def record(index: int, sent: float, times: list[float], counts: list[int], error: str = "") -> Record:
    return Record(
        index=index,
        due_s=sent - 0.001,
        num_prompt_tokens=100,
        num_asked_tokens=sum(counts),
        sent_s=sent,
        end_s=times[-1] + 0.5 if times else sent + 9.0,
        chunk_times=times,
        chunk_tokens=counts,
        num_output_tokens=sum(counts),
        error=error,
    )


# TTFT 1, 0.5, 2; E2E 3, 0.5, 4; TPOT 2/3, -, 1; gaps 1 0 1 | 1 1
RECORDS = [
    record(0, 0.0, [1.0, 2.0, 3.0], [1, 2, 1]),
    record(1, 1.0, [1.5], [1]),
    record(2, 2.0, [4.0, 5.0, 6.0], [1, 1, 1]),
    record(3, 2.5, [3.0], [1], error="HTTP 500: no"),
    record(4, 3.0, [], [], error="HTTP 500: no"),
]
BY_HAND = {"ttft": [1, 0.5, 2], "e2el": [3, 0.5, 4], "tpot": [2 / 3, 1], "itl": [1, 0, 1, 1, 1]}


@pytest.mark.parametrize("metric", list(BY_HAND))
def test_latencies_are_those_of_numpy(metric: str) -> None:
    found, values = summarize(RECORDS), 1e3 * np.array(BY_HAND[metric])
    wanted = {"mean": values.mean(), "median": np.median(values), "std": values.std(), "max": values.max()}
    wanted |= {f"p{p}": np.percentile(values, p) for p in (50, 90, 99)}
    assert {name: found[f"{name}_{metric}_ms"] for name in wanted} == pytest.approx(wanted)


def test_counts_and_throughputs_are_of_whole_answers() -> None:
    found = summarize(RECORDS)
    assert (found["completed"], found["failed"], found["error_counts"]) == (3, 2, {"HTTP 500: no": 2})
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (300, 8)
    assert found["duration"] == 12.0  # the failed request's end, 3 + 9
    assert found["request_throughput"] == pytest.approx(3 / 12)
    assert (found["input_throughput"], found["output_throughput"]) == (25.0, pytest.approx(8 / 12))
    assert found["max_concurrent_requests"] == 2
    assert found["max_output_tokens_per_s"] == 2.0  # second 1: token 1 at 1.0 and the short answer
    assert found["max_send_delay_ms"] == pytest.approx(1.0)
    assert summarize(RECORDS, duration_s=24.0)["request_throughput"] == pytest.approx(3 / 24)


def test_goodput_counts_requests_within_all_limits() -> None:
    def good(**limits: float) -> float:
        return float(summarize(RECORDS, slos=limits)["request_goodput"] * 12)

    assert good(ttft=1000) == pytest.approx(2)
    assert good(ttft=1000, tpot=600) == pytest.approx(1)  # the answer of one token has no TPOT
    assert good(e2el=1e9) == pytest.approx(3)
    assert summarize(RECORDS)["request_goodput"] is None


def test_a_run_without_an_answer_has_no_latency() -> None:
    found = summarize(RECORDS[3:])
    assert (found["completed"], found["mean_ttft_ms"], found["p99_itl_ms"]) == (0, None, None)
    assert found["output_throughput"] == 0.0
    assert latency_rows(found)[1][1:] == ["-"] * 6


@pytest.mark.parametrize("text", ["ttft", "ttft:0", "ttft:x", "p99:3", "itl:5", ":4"])
def test_a_limit_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be NAME:MS, MS above 0; names are ttft, tpot, e2el"):
        parse_slos([text])


def test_the_document_has_vllms_names(tmp_path: Path) -> None:
    facts = {"model_id": "m", "num_prompts": 5, "request_rate": "inf", "burstiness": 1.0}
    path = tmp_path / "out.json"
    write_json(path, document(facts, summarize(RECORDS), RECORDS))
    found = json.loads(path.read_text())
    lists = {"input_lens", "output_lens", "ttfts", "itls", "generated_texts", "errors", "start_times"}
    names = "date model_id num_prompts request_rate burstiness duration completed failed total_input_tokens "
    names += "total_output_tokens request_throughput request_goodput output_throughput total_token_throughput"
    latencies = {f"{s}_{m}_ms" for m in BY_HAND for s in ("mean", "median", "std", "p50", "p90", "p99")}
    assert {*names.split(), *lists} | latencies <= set(found)
    assert all(len(found[name]) == 5 for name in lists)
    assert (found["ttfts"][2], found["itls"][0]) == (2.0, [1.0, 0.0, 1.0])
    assert per_request(RECORDS)["output_lens"] == [4, 1, 3, 0, 0]


def test_the_page_needs_no_other_file() -> None:
    runs = {"one <run>": RECORDS, "nothing": RECORDS[3:]}
    figures = [distributions(runs), timeline(RECORDS), timeline([]), throughput(runs)]
    figures.append(load_curves({"a": [summarize(RECORDS)]}, ["p99_ttft_ms"], {"p99_ttft_ms": 5.0}))
    text = page("A <title>", "facts", [throughput_rows(summarize(RECORDS))], figures)
    assert text.count("<svg") == 5 and "A &lt;title&gt;" in text and "<run>" not in text
    assert all(word in text for word in ("TTFT", "TBT", "Throughput, decode", "p99_ttft_ms"))
    assert "src=" not in text and "<?xml" not in text and "<script" not in text


# Capacity


def tries_of(capacity: float, **changes: Any) -> list[Try]:
    """Of an endpoint that keeps its limit up to `capacity` requests per second."""

    def attempt(rate: float) -> Try:
        summary = {"failed": 0, "p99_ttft_ms": 1e3 * rate / capacity}
        return Try(rate, summary, missed(summary, {"p99_ttft_ms": 1000}))

    return search(attempt, SearchConfig(**changes))


@pytest.mark.parametrize("capacity", [0.03, 0.9, 1.0, 3.7, 900.0])
def test_the_search_closes_in_on_the_capacity(capacity: float) -> None:
    found = tries_of(capacity, max_tries=30)
    good, bad = best(found), worst(found)
    assert good and bad and good.rate <= capacity < bad.rate <= 1.1 * good.rate
    assert len(found) <= 15


def test_the_search_ends_at_its_bounds() -> None:
    assert [each.rate for each in tries_of(1e9, most_rate=5.0)] == [1.0, 2.0, 4.0, 5.0]
    nothing = tries_of(1e-9, least_rate=0.3)
    assert [each.rate for each in nothing] == [1.0, 0.5, 0.3] and best(nothing) is None
    assert len(tries_of(3.7, max_tries=4)) == 4


def test_a_failed_request_misses_every_limit() -> None:
    summary = {"failed": 2, "p99_ttft_ms": None, "mean_itl_ms": 7.0}
    assert missed(summary, parse_limits("p99_ttft_ms:5,mean_itl_ms:6.5")) == (
        "2 requests failed",
        "p99_ttft_ms was not measured",
        "mean_itl_ms 7 > 6.5",
    )
    assert missed(summary | {"failed": 0}, {"mean_itl_ms": 7.0}) == ()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"start_rate": 0.0}, "must rise from above 0"),
        ({"most_rate": 0.5}, "must rise from above 0"),
        ({"precision": 0.0}, "precision=0.0 must be above 0"),
        ({"max_tries": 0}, "max_tries=0 must be at least 1"),
    ],
)
def test_a_search_that_cannot_be_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SearchConfig(**changes)
