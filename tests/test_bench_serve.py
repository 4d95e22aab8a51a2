"""`sps2 bench` as users start it, against a real server of a tiny model."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.served import Server, serve
from megatron_sps2.cli.main import main
from tests.sps2_command import make_checkpoint, sps2
from tests.tiny_llama import VOCAB_SIZE

pytestmark = pytest.mark.slow

NUM_REQUESTS, CONTEXT = 12, 1024
# Input, output; the first block is the same in all. The last one is longer than the context.
LENGTHS = [(90 * i + 40, 4 + i % 3) for i in range(NUM_REQUESTS - 1)] + [(1200, 8)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    checkpoint = make_checkpoint(tmp_path_factory.mktemp("bench"), num_hidden_layers=2)
    flags = ("--max-model-len", CONTEXT, "--served-model-name", "tiny", "--api-key", "a-secret")
    with serve(checkpoint, *flags) as server:
        yield server


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a Mooncake trace in it."""
    folder = tmp_path_factory.mktemp("out")
    rows = [
        {
            "timestamp": 50 * i,
            "input_length": length,
            "output_length": output,
            "hash_ids": [0, *(10 * i + k for k in range(1, -(-length // 512)))],
        }
        for i, (length, output) in enumerate(LENGTHS)
    ]
    (folder / "trace.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def arguments(server: Server, folder: Path) -> list[str]:
    endpoint = ("--base-url", server.base_url, "--api-key", "a-secret", "--vocab-size", VOCAB_SIZE)
    trace = ("--trace", folder / "trace.jsonl", "--num-requests", NUM_REQUESTS, "--seed", 3)
    return list(map(str, (*endpoint, *trace)))


def bench(server: Server, folder: Path, action: str, *flags: object) -> subprocess.CompletedProcess[str]:
    return sps2("bench", action, *arguments(server, folder), *flags)


@pytest.fixture(scope="module")
def served(server: Server, folder: Path) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    limits = ("--goodput", "ttft:60000", "tpot:60000")
    outputs = ("--json", folder / "out.json", "--html", folder / "out.html", "--num-warmups", 1)
    done = bench(server, folder, "serve", "--model", "tiny", *limits, *outputs)
    assert (done.returncode, done.stderr) == (0, "")
    return done, json.loads((folder / "out.json").read_text())


def test_all_requests_of_a_trace_are_answered_whole(
    served: tuple[subprocess.CompletedProcess[str], dict[str, Any]], server: Server
) -> None:
    _, found = served
    wanted = [*LENGTHS[:-1], (CONTEXT - 8, 8)]
    assert (found["completed"], found["failed"], found["errors"]) == (NUM_REQUESTS, 0, [""] * NUM_REQUESTS)
    assert list(zip(found["input_lens"], found["output_lens"], strict=True)) == wanted
    assert found["total_input_tokens"] == sum(length for length, _ in wanted)
    assert found["total_output_tokens"] == sum(output for _, output in wanted)
    assert found["num_clipped"] == 1 and found["max_model_len"] == CONTEXT
    assert list(map(len, found["itls"])) == [output - 1 for _, output in wanted]
    assert server.metric("sps2:request_success_total") >= NUM_REQUESTS + 1  # the warm-up, too


def test_shared_blocks_are_found_in_the_prefix_cache(
    served: tuple[subprocess.CompletedProcess[str], dict[str, Any]],
) -> None:
    """Where hash ids did not give equal tokens, there would be none."""
    assert served[1]["total_cached_tokens"] > 512


def test_latencies_add_up(served: tuple[subprocess.CompletedProcess[str], dict[str, Any]]) -> None:
    _, found = served
    assert 0 < found["p50_ttft_ms"] <= found["p99_ttft_ms"] <= found["max_ttft_ms"] <= found["max_e2el_ms"]
    assert found["request_goodput"] == pytest.approx(found["request_throughput"])
    for ttft, gaps, e2e in zip(found["ttfts"], found["itls"], found["e2els"], strict=True):
        assert ttft + sum(gaps) == pytest.approx(e2e)
    assert found["start_times"] == sorted(found["start_times"])
    assert found["duration"] > 0.05 * (NUM_REQUESTS - 1)  # the trace's own time


def test_the_table_and_the_page_show_them(
    served: tuple[subprocess.CompletedProcess[str], dict[str, Any]], folder: Path
) -> None:
    done, found = served
    page = (folder / "out.html").read_text()
    for text in (done.stdout, page):
        assert all(word in text for word in ("TTFT", "TBT", "TPOT", "E2E", "prefill tokens/s", "p99"))
        assert f"{found['total_input_tokens']:,}" in text
    assert page.count("<svg") == 3


def test_capacity_tries_rates_until_it_knows(server: Server, folder: Path) -> None:
    search = ("--slo", "p99_ttft_ms:60000", "--start-rate", 40, "--most-rate", 80)
    outputs = ("--json", folder / "capacity.json", "--html", folder / "capacity.html")
    done = bench(server, folder, "capacity", "--arrivals", "constant", *search, *outputs)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "capacity: 80 requests/s; no higher rate was tried"
    found = json.loads((folder / "capacity.json").read_text())
    assert [each["request_rate"] for each in found["tries"]] == [40, 80]
    assert found["request_rate"] == 80 and "<svg" in (folder / "capacity.html").read_text()


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--api-key", "wrong"), "answers 401"),
        (("--model", "huge"), "model 'huge' is not served at"),
        (("--text", "x"), "--text FILE and --tokenizer CHECKPOINT belong together"),
        (("--arrivals", "closed"), "give --max-concurrency"),
        (("--num-warmups", "-1"), "--num-warmups -1 must be 0"),
        (("--json", "nowhere/out.json"), "the folder of --json, does not exist"),
    ],
)
def test_a_mistake_is_one_line(
    server: Server,
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    said: str,
) -> None:
    assert main(["bench", "serve", *arguments(server, folder), *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and len(err.splitlines()) == 1
