"""Traces, workloads and arrivals: read as they are, scaled and clipped as asked, drawn from a seed."""

from __future__ import annotations

import itertools
import json
import os
import statistics
from pathlib import Path

import pytest

from megatron_sps2.bench.arrivals import KINDS, ArrivalConfig, arrival_times
from megatron_sps2.bench.trace import FORMATS, Planned, read_trace, synthetic
from megatron_sps2.bench.workload import WorkloadConfig, build, num_clipped, scaled
from megatron_sps2.cli.bench_arguments import ARRIVALS, TRACE_FORMATS

MOONCAKE = {"timestamp": 3000, "input_length": 1100, "output_length": 7, "hash_ids": [0, 5, 9]}


def write(folder: Path, *lines: object) -> Path:
    path = folder / "trace"
    path.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines) + "\n")
    return path


def test_the_command_line_offers_what_can_be_read_and_sent() -> None:
    assert (TRACE_FORMATS, ARRIVALS) == (FORMATS, KINDS)


def test_mooncake_lines_are_read_in_order_of_arrival(tmp_path: Path) -> None:
    late = MOONCAKE | {"timestamp": 4500, "input_length": 512, "hash_ids": [0]}
    found = read_trace(write(tmp_path, late, "", MOONCAKE), "mooncake")
    assert found == [
        Planned(arrival_s=0.0, num_prompt_tokens=1100, num_output_tokens=7, hash_ids=(0, 5, 9)),
        Planned(arrival_s=1.5, num_prompt_tokens=512, num_output_tokens=7, hash_ids=(0,)),
    ]


def test_azure_times_are_differences_of_dates(tmp_path: Path) -> None:
    head = "TIMESTAMP,ContextTokens,GeneratedTokens"
    # Over a change of the clock in many countries: no time zone may come in.
    lines = ("2023-10-29 00:30:00.9799600,4808,10", "2023-10-29 04:30:01.4799600,3180,8")
    first, second = read_trace(write(tmp_path, head, *lines), "azure")
    assert (first.num_prompt_tokens, first.num_output_tokens, second.num_prompt_tokens) == (4808, 10, 3180)
    assert second.arrival_s == pytest.approx(4 * 3600 + 0.5)


def test_a_csv_of_lengths_needs_no_arrivals(tmp_path: Path) -> None:
    found = read_trace(write(tmp_path, "output_tokens,prompt_tokens", "3,40", "4,50"), "csv")
    assert [(each.arrival_s, each.num_prompt_tokens) for each in found] == [(0.0, 40), (0.0, 50)]
    [first, second] = read_trace(
        write(tmp_path, "arrival_s,prompt_tokens,output_tokens", "2.5,4,1", "1,9,1"), "csv"
    )
    assert (first.num_prompt_tokens, second.arrival_s) == (9, 1.5)


@pytest.mark.parametrize(
    ("trace_format", "lines", "said"),
    [
        ("mooncake", ["{"], "line 1: '{': must be one JSON object"),
        ("mooncake", [MOONCAKE, "7"], "line 2: '7': must be a JSON object"),
        ("mooncake", [MOONCAKE | {"input_length": 0}], "line 1: 0: input_length must be a whole number"),
        ("mooncake", [MOONCAKE | {"output_length": 1.5}], "1.5: output_length must be a whole number"),
        ("mooncake", [MOONCAKE | {"timestamp": None}], "None: timestamp must be a number"),
        ("mooncake", [MOONCAKE | {"hash_ids": [0]}], "'1 hash_ids': input_length 1100 has 3 blocks"),
        ("mooncake", [MOONCAKE | {"hash_ids": [0, -1, 2]}], "must be a list of integers of at least 0"),
        ("azure", ["TIMESTAMP,ContextTokens", "x,1"], "line 1: 'TIMESTAMP,ContextTokens': the first line"),
        (
            "azure",
            ["TIMESTAMP,ContextTokens,GeneratedTokens", "noon,1,2"],
            "line 2: 'noon': TIMESTAMP must be",
        ),
        ("csv", ["prompt_tokens,output_tokens", "5,many"], "line 2: 'many': output_tokens must be"),
        ("csv", ["prompt_tokens,output_tokens", "5"], "line 2: None: output_tokens must be"),
        ("csv", ["prompt_tokens,output_tokens"], "has no requests"),
        ("xml", ["prompt_tokens"], "trace format 'xml' is not known; use mooncake, azure, csv, synthetic"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, trace_format: str, lines: list[object], said: str) -> None:
    with pytest.raises(ValueError) as error:
        read_trace(write(tmp_path, *lines), trace_format)
    assert said in str(error.value)


def test_a_trace_that_is_too_short_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 1 requests, fewer than 2; ask for fewer"):
        read_trace(write(tmp_path, MOONCAKE), "mooncake", num_requests=2)


@pytest.mark.parametrize(
    ("name", "trace_format", "count"),
    [
        ("mooncake_conversation_trace.jsonl", "mooncake", 12031),
        ("AzureLLMInferenceTrace_code.csv", "azure", 8819),
    ],
)
def test_published_traces_are_read_whole(name: str, trace_format: str, count: int) -> None:
    path = Path(os.environ.get("SPS2_TRACES", "")) / name
    if not path.exists():
        pytest.skip(f"{name} is absent; SPS2_TRACES is a folder with the published traces")
    assert len(read_trace(path, trace_format)) == count


def test_a_mix_has_its_shares_and_lengths() -> None:
    mix = synthetic("0.8:128-1024,0.2:4096-8192:64-64", 2000, seed=1)
    long = [each for each in mix if each.num_prompt_tokens > 1024]
    assert 0.17 < len(long) / len(mix) < 0.23  # 3.3 standard deviations
    assert {each.num_output_tokens for each in long} == {64}
    assert all(4096 <= each.num_prompt_tokens <= 8192 for each in long)
    assert min(each.num_prompt_tokens for each in mix) < 150
    assert mix == synthetic("0.8:128-1024,0.2:4096-8192:64-64", 2000, seed=1)


@pytest.mark.parametrize("spec", ["", "0.5", "0.5:9-3", "-1:3-4", "nan:3-4", "1:0-4", "1:a-b", "1:2:3:4"])
def test_a_mix_that_makes_no_sense_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="must be SHARE:LEAST-MOST"):
        synthetic(spec, 10)


# Workloads


def plan(*hash_ids: int, num_prompt_tokens: int | None = None, output: int = 8) -> Planned:
    length = num_prompt_tokens or 512 * len(hash_ids)
    return Planned(arrival_s=1.0, num_prompt_tokens=length, num_output_tokens=output, hash_ids=hash_ids)


@pytest.mark.parametrize("scale", [1.0, 0.0625, 0.01, 0.3, 1.7])
def test_equal_hash_ids_give_equal_prefixes(scale: float) -> None:
    config = WorkloadConfig(length_scale=scale, vocab_size=50_000)
    one, other, short = build([plan(1, 2, 3), plan(1, 2, 4), plan(1, num_prompt_tokens=300)], config)
    shared = round(1024 * scale)
    assert len(one.prompt) == len(other.prompt) == round(1536 * scale)
    assert one.prompt[:shared] == other.prompt[:shared]
    assert one.prompt[shared:] != other.prompt[shared:]
    assert short.prompt == one.prompt[: round(300 * scale)]


def test_prompts_are_drawn_from_the_seed() -> None:
    planned = [plan(1, 2), Planned(arrival_s=0.0, num_prompt_tokens=40, num_output_tokens=1)]
    first, again, other = (build(planned, WorkloadConfig(seed=seed, vocab_size=100)) for seed in (3, 3, 4))
    assert first == again
    assert all(a.prompt != b.prompt for a, b in zip(first, other, strict=True))
    assert all(0 <= token < 100 for ask in first for token in ask.prompt)


def test_a_text_is_cut_by_hash_id() -> None:
    corpus = list(range(10_000, 12_000))
    one, other = build([plan(1, 2), plan(1, 3)], WorkloadConfig(), corpus)
    assert one.prompt[:512] == other.prompt[:512] and one.prompt[512:] != other.prompt[512:]
    steps = {(late - early) % 2000 for early, late in zip(one.prompt[:512], one.prompt[1:512], strict=False)}
    assert steps == {1}  # in the text's order, from its end on to its start
    assert set(one.prompt) <= set(corpus)


def test_a_text_is_read_on_where_hash_ids_count_on() -> None:
    corpus = list(range(5000))
    first, second = build([plan(7, 8, 9, 40), plan(7, 8, 90)], WorkloadConfig(length_scale=0.1), corpus)
    steps = [(late - early) % 5000 for early, late in itertools.pairwise(first.prompt)]
    assert steps[:153] == [1] * 153 and steps[153] != 1  # 40 begins elsewhere
    assert first.prompt[:102] == second.prompt[:102] and first.prompt[102] != second.prompt[102]


def test_a_text_shorter_than_a_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="the text has 1000 tokens and the longest prompt 1024"):
        build([plan(1, 2)], WorkloadConfig(), list(range(1000)))


def test_times_and_lengths_are_scaled() -> None:
    [found] = scaled([plan(1, 2)], WorkloadConfig(time_scale=3.0, length_scale=0.25))
    assert (found.arrival_s, found.num_prompt_tokens, found.num_output_tokens) == (3.0, 256, 2)
    [least] = scaled([plan(1, num_prompt_tokens=2)], WorkloadConfig(length_scale=0.01))
    assert (least.num_prompt_tokens, least.num_output_tokens) == (1, 1)


@pytest.mark.parametrize(
    ("prompt", "output", "kept"),
    [(92, 8, (92, 8)), (500, 8, (92, 8)), (500, 80, (50, 50)), (20, 500, (20, 80)), (60, 500, (50, 50))],
)
def test_the_context_clips_prompts_first(prompt: int, output: int, kept: tuple[int, int]) -> None:
    planned = [Planned(arrival_s=0.0, num_prompt_tokens=prompt, num_output_tokens=output)]
    config = WorkloadConfig(max_model_len=100)
    [ask] = build(planned, config)
    assert (len(ask.prompt), ask.num_output_tokens) == kept
    assert num_clipped(planned, config) == (kept != (prompt, output))


@pytest.mark.parametrize(
    "changes",
    [{"time_scale": 0}, {"length_scale": -1}, {"max_model_len": 1}, {"vocab_size": 0}, {"seed": -1}],
)
def test_a_workload_that_cannot_be_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))}=.* must be"):
        WorkloadConfig(**changes)  # type: ignore[arg-type]


# Arrivals


def gaps(kind: str, burstiness: float = 1.0, count: int = 4001) -> list[float]:
    config = ArrivalConfig(kind=kind, request_rate=5.0, burstiness=burstiness, seed=2)
    times = arrival_times(config, [0.0] * count)
    assert times[0] == 0.0 and times == sorted(times)
    return [late - early for early, late in zip(times, times[1:], strict=False)]


@pytest.mark.parametrize(("kind", "burstiness"), [("poisson", 1.0), ("gamma", 0.25), ("gamma", 4.0)])
def test_random_arrivals_have_their_rate_and_spread(kind: str, burstiness: float) -> None:
    found = gaps(kind, burstiness)
    assert statistics.mean(found) == pytest.approx(0.2)
    spread = statistics.stdev(found) / statistics.mean(found)
    assert spread == pytest.approx(burstiness**-0.5, rel=0.1)  # 4,000 gaps: a few percent of noise


def test_constant_arrivals_are_even() -> None:
    assert gaps("constant", count=6) == pytest.approx([0.2] * 5)


def test_a_traces_times_are_kept_or_brought_to_a_rate() -> None:
    traced = [0.0, 1.0, 4.0]
    assert arrival_times(ArrivalConfig(kind="trace"), traced) == traced
    assert arrival_times(ArrivalConfig(kind="trace", request_rate=2.0), traced) == [0.0, 0.25, 1.0]
    with pytest.raises(ValueError, match="all requests of the trace come at once"):
        arrival_times(ArrivalConfig(kind="trace", request_rate=2.0), [0.0, 0.0])
    assert arrival_times(ArrivalConfig(kind="closed"), traced) == [0.0] * 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kind": "poison"}, "arrivals 'poison' are not known"),
        ({"kind": "poisson"}, "need a rate"),
        ({"request_rate": 0}, "request_rate=0 must be above 0"),
        ({"kind": "gamma", "request_rate": 1, "burstiness": 0}, "burstiness=0 must be above 0"),
    ],
)
def test_arrivals_that_cannot_be_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ArrivalConfig(**changes)  # type: ignore[arg-type]
