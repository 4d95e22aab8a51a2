"""The KV cache gets what weights and the largest prefill leave: the arithmetic, the prefill, and an engine.

What a CUDA device would tell is made up; one test at the end asks a real one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from checkpoints_tools.convert import convert
from megatron_sps2.attention.core import PrefillStep
from megatron_sps2.attention.kv_cache import KVCache
from megatron_sps2.attention.strategy import lay_out
from megatron_sps2.cli.main import parse_args
from megatron_sps2.cli.serve import _serve_config, check_serve
from megatron_sps2.config import CacheConfig, ModelConfig, ParallelConfig, SamplingParams, ScheduleConfig
from megatron_sps2.csa_setting import PRESETS
from megatron_sps2.engine.build import EngineConfig, build_engine, make_cache
from megatron_sps2.engine.device_memory import DeviceMemory
from megatron_sps2.engine.dry_prefill import (
    dry_prefills,
    largest_step,
    layers_of_each_kind,
    max_started_tokens,
)
from megatron_sps2.engine.engine import Engine
from megatron_sps2.engine.fitting_cache import Room, fit_cache
from megatron_sps2.engine.measured_cache import paused_bytes
from megatron_sps2.engine.rank_memory import kv_layer_bytes, paused_row_bytes
from megatron_sps2.model.gpt import GptForward
from megatron_sps2.ops.append import append_roped
from megatron_sps2.ops.kernel_set import TORCH
from megatron_sps2.simulator.shapes import SHAPES
from tests.ranks import RankFailed, run_ranks
from tests.tiny_llama import prompt, save_hf_llama

GIB = 2**30
LLAMA = SHAPES["llama3-8b"]
HEADS = (8, 2)


def config(longest: int = 1000, sp_size: int = 1, policy: str = "sps2", **more: Any) -> EngineConfig:
    schedule = ScheduleConfig(policy=policy, max_num_batched_tokens=more.pop("batched", 256))  # type: ignore[arg-type]
    values: dict[str, Any] = {"gpu_memory_utilization": 0.9, "block_size": 64, **more}
    return EngineConfig(
        checkpoint="",
        parallel=ParallelConfig(sp_size=sp_size),
        max_model_len=longest,
        schedule=replace(schedule, **values.pop("schedule", {})),
        **values,
    )


def test_the_fullest_rank_decides() -> None:
    rooms = [
        Room(total=80 * GIB, used=20 * GIB, activations=2 * GIB),
        Room(total=80 * GIB, used=21 * GIB, activations=3 * GIB),
        Room(total=90 * GIB, used=20 * GIB, activations=1 * GIB),
    ]
    assert fit_cache(config(), GIB, rooms) == CacheConfig(num_blocks=72 - 21 - 3, block_size=64)
    assert fit_cache(config(500, gpu_memory_utilization=0.5), GIB, rooms).num_blocks == 40 - 21 - 3
    assert fit_cache(config(block_size=16), GIB // 4, rooms[:1]) == CacheConfig(num_blocks=200, block_size=16)


def test_less_than_one_request_is_refused_with_all_numbers() -> None:
    """1,000 tokens are 16 blocks of 64; a block more for an uneven end, and one for uneven chunks."""
    room = Room(total=10 * GIB, used=GIB, activations=GIB // 2)
    assert config().fewest_blocks == 18
    assert fit_cache(config(), int(7.5 * GIB) // 18, [room]).num_blocks == 18
    with pytest.raises(ValueError) as caught:
        fit_cache(config(), int(7.5 * GIB) // 18 + 1, [Room(total=99 * GIB, used=0), room])
    for part in ("rank 1 has 7.50 GiB", "0.9 of 10.00 GiB", "1.00 GiB used", "0.50 GiB for the largest"):
        assert part in str(caught.value)
    for part in ("one request of 1,000 tokens needs 7.50 GiB", "--gpu-memory-utilization", "--sp or --tp"):
        assert part in str(caught.value)
    assert "--kv-cache-dtype fp8" in str(caught.value)
    with pytest.raises(ValueError) as caught:
        fit_cache(config(kv_cache_dtype="fp8"), GIB, [Room(total=GIB, used=3 * GIB)])
    assert "has -2.10 GiB" in str(caught.value) and "fp8" not in str(caught.value)


@pytest.mark.parametrize("value", [0.0, -0.1, 1.01])
def test_a_share_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="must be above 0 and at most 1"):
        config(gpu_memory_utilization=value)


@pytest.mark.parametrize(
    ("policy", "sp_size", "longest", "batched", "expected"),
    [
        # A whole prompt, or batches of short ones: with sps2 so many tokens on each rank.
        ("sps2", 1, 1000, 256, ([1000], 0)),
        ("sps2", 4, 1000, 512, ([1000, 1000, 48], 0)),
        ("sps2", 4, 1000, 250, ([1000], 0)),
        ("fcfs", 4, 1000, 512, ([1000], 0)),
        ("fcfs", 1, 1000, 2500, ([1000, 1000, 500], 0)),
        # The last chunk: all before it is cached.
        ("sarathi", 2, 1000, 256, ([256], 744)),
        ("sarathi", 2, 200, 256, ([200], 0)),
    ],
)
def test_the_largest_step_of_a_policy(
    policy: str, sp_size: int, longest: int, batched: int, expected: tuple[list[int], int]
) -> None:
    assert largest_step(config(longest, sp_size, policy, batched=batched)) == expected


def test_short_prompts_may_be_longer_than_a_batch() -> None:
    assert largest_step(config(300, 2, schedule={"short_prompt_tokens": 400})) == ([300, 300, 200], 0)


@pytest.mark.parametrize(
    ("policy", "more"),
    [
        ("sps2", {}),
        ("sps2", {"csa": PRESETS["default"]}),
        ("sps2", {"schedule": {"prefix_caching": True}}),
        ("fcfs", {"batched": 20_000}),
        ("sarathi", {}),
    ],
)
@pytest.mark.parametrize("sp_size", [1, 3])
def test_plans_grant_blocks_for_every_token_and_none_twice(
    policy: str, more: dict[str, Any], sp_size: int
) -> None:
    asked = config(9000, sp_size, policy, **more)
    found = list(dry_prefills(asked, LLAMA))
    assert [each.plans[0].pieces[0].strategy == "csa" for each in found] == [False, True][: len(found)]
    assert len(found) == (2 if asked.csa else 1)
    for dry in found:
        lengths, num_past = largest_step(asked)
        first = dry.plans[0].pieces
        assert [piece.stop - piece.start for piece in first] == lengths
        assert {piece.start for piece in first} == {num_past} and dry.num_past * sp_size >= num_past
        assert all(len(piece.prompt.token_ids) == piece.stop for piece in first if piece.prompt)
        for rank in range(sp_size):
            blocks = [*dry.past_blocks, *(b for piece in first for b in piece.blocks[rank])]
            assert len(set(blocks)) == len(blocks) and set(blocks) <= set(range(dry.cache.num_blocks))
            for piece, length in zip(first, lengths, strict=True):
                unit = 64 if asked.schedule.prefix_caching else 1
                layout = lay_out(piece.strategy, length, sp_size, asked.csa, unit=unit)
                assert len(piece.blocks[rank]) * 64 >= layout.tokens_per_rank[rank]
        assert all(b - 1 == next_ for b, next_ in zip(dry.past_blocks, dry.past_blocks[1:], strict=False))


def test_prompts_that_pause_beside_a_largest_step_are_counted() -> None:
    row = 4096 * 2 + 128 * (4 + 2 * 2) + 8
    assert paused_row_bytes(LLAMA, "bfloat16") == row
    asked = config(9000, 4, batched=256, dtype="bfloat16")
    assert max_started_tokens(asked) == 18_000
    assert paused_bytes(asked, LLAMA) == 2250 * row
    with_short = {"short_prompt_tokens": 100, "max_num_seqs": 7}
    assert paused_bytes(config(9000, 4, dtype="bfloat16", schedule=with_short), LLAMA) == (2250 + 700) * row
    given = config(9000, 4, dtype="bfloat16", schedule={"max_started_tokens": 10_000})
    assert max_started_tokens(given) == 10_000 and paused_bytes(given, LLAMA) == 250 * row
    for policy in ("fcfs", "sarathi"):
        assert max_started_tokens(config(policy=policy)) is None
        assert paused_bytes(config(policy=policy), LLAMA) == 0


def test_a_layer_of_each_kind_is_run() -> None:
    assert layers_of_each_kind(LLAMA) == [0]
    model = replace(LLAMA, window=512, window_layers=(0, 1, 2, 4, 5))
    assert layers_of_each_kind(model) == [0, 3]
    plans = next(iter(dry_prefills(config(policy="fcfs"), model))).plans
    layers = [(plan.pieces[0].first_layer, plan.pieces[0].last_layer) for plan in plans]
    assert layers == [(0, 1), (3, 4)] and not plans[1].pieces[0].blocks


# On ranks.


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("measured")
    save_hf_llama(folder / "hf", *HEADS)
    convert(folder / "hf", folder / "megatron")
    return folder / "megatron"


TOTAL, BASE, PEAK = 10_000_000, 3_000_000, 1_500_000
# Hidden state (64), angles, cosines and sines (8 each), fp32, and a slot of as many tokens as a largest step
# has on one of two ranks: they may pause beside it.
PAUSED = 256 * ((64 + 3 * 8) * 4 + 8)


@contextmanager
def told() -> Iterator[None]:
    """A device in place of the CUDA calls: rank 1 has a little less; a run needs PEAK beside its cache."""
    caches = list[int]()

    def make(*args: Any) -> KVCache:
        cache = make_cache(*args)
        caches.append(cache.bytes_per_token * cache.config.tokens_per_rank)
        return cache

    def measure(run: Callable[[], None], device: torch.device) -> DeviceMemory:
        before = len(caches)
        run()
        made = caches[before:]
        free = TOTAL - BASE - 100_000 * dist.get_rank()
        return DeviceMemory(total=TOTAL, free=free, peak=PEAK + sum(made) if made else 0)

    with (
        mock.patch("megatron_sps2.engine.build.make_cache", make),
        mock.patch("megatron_sps2.engine.device_memory.measure_memory", measure),
    ):
        yield


def build_without_a_run(asked: EngineConfig) -> dict[str, Any]:
    with mock.patch("megatron_sps2.engine.build.run_dry"):
        return build(asked)


def build(asked: EngineConfig) -> dict[str, Any]:
    """On a rank: what an engine of measured memory has, ran before it served, and answers."""
    rows, plain = list[int](), GptForward.layer

    def layer(forward: GptForward, index: int, hidden: Tensor, angles: Any) -> Tensor:
        rows.append(len(hidden))
        return plain(forward, index, hidden, angles)

    with told(), mock.patch.object(GptForward, "layer", layer):
        engine = build_engine(asked)
    found = {"rows": rows, "tokens": answer(engine), "used": engine._runner.num_used_blocks}
    return found | {"capacity": engine.blocks.capacity, "bytes": engine.kv_bytes}


def answer(engine: Engine) -> list[int]:
    """Of rank 0."""
    if not engine.is_leader:
        engine.follow()
        return []
    request = engine.add_request(prompt(300).tolist(), SamplingParams(max_tokens=8, ignore_eos=True))
    while request.finish_reason is None:
        engine.step()
    engine.release(request)
    engine.step()
    engine.stop()
    return request.output_ids


def small(checkpoint: Path, **more: Any) -> EngineConfig:
    return replace(config(500, 2, block_size=4, **more), checkpoint=str(checkpoint))


@pytest.mark.parametrize("kept", ["auto", "fp8"])
def test_an_engine_gives_its_cache_what_is_left_and_answers_as_ever(checkpoint: Path, kept: Any) -> None:
    asked = small(checkpoint, kv_cache_dtype=kept)
    first, second = run_ranks(2, build, asked)
    # One layer of a prompt of 500 tokens and one of 12, on two ranks.
    assert first["rows"] == second["rows"] == [256]
    # K and V of 2 layers, 2 heads, 8 numbers or 8 bytes and a scale; 4 tokens a block.
    block_bytes = 2 * 2 * 2 * (8 * 4 if kept == "auto" else 8 + 4) * 4
    wanted = (int(0.9 * TOTAL) - BASE - 100_000 - PEAK - PAUSED) // block_bytes
    assert first["capacity"] == 2 * wanted * 4 and first["bytes"] == second["bytes"] == wanted * block_bytes
    assert first["used"] == second["used"] == 0
    given = replace(asked, gpu_memory_utilization=None, cache=CacheConfig(num_blocks=200, block_size=4))
    assert first["tokens"] == run_ranks(2, build, given)[0]["tokens"] and len(first["tokens"]) == 8


def build_with_recordings(asked: EngineConfig) -> dict[str, Any]:
    """On a rank: decode steps were recorded, and keep memory that no peak shows."""
    with mock.patch("megatron_sps2.engine.build.record_graphs", lambda *_: RECORDED):
        return build(asked)


RECORDED = 512 * 1000


def test_what_recorded_decode_steps_keep_is_not_given_to_the_cache(checkpoint: Path) -> None:
    asked = small(checkpoint)
    plain, recorded = (run_ranks(2, each, asked)[0] for each in (build, build_with_recordings))
    assert plain["bytes"] - recorded["bytes"] == RECORDED and recorded["tokens"] == plain["tokens"]


def test_chunks_are_measured_onto_what_is_cached(checkpoint: Path) -> None:
    (only,) = run_ranks(1, build, replace(small(checkpoint, policy="sarathi"), parallel=ParallelConfig()))
    assert only["rows"] == [256]


def test_control_a_run_that_is_not_made_measures_nothing(checkpoint: Path) -> None:
    """With the size given, nothing is run before a request comes."""
    asked = replace(small(checkpoint), cache=CacheConfig(num_blocks=200, block_size=4))
    assert run_ranks(2, build, asked)[0]["rows"] == []
    assert run_ranks(2, build_without_a_run, small(checkpoint))[0]["rows"] == []


def test_no_room_is_said_by_every_rank_alike(checkpoint: Path) -> None:
    with pytest.raises(RankFailed, match=r"rank 1 has 0.00 GiB for its KV cache"):
        run_ranks(2, build, small(checkpoint, gpu_memory_utilization=0.31))


def pause(asked: EngineConfig) -> int:
    """On a rank: bytes of a prompt of 500 tokens that pauses after its first layer, where kernels turn."""
    runner = build_engine(asked)._runner
    runner.kernels = replace(TORCH, append_roped=append_roped)
    dry = next(iter(dry_prefills(asked, runner._forward.model)))
    runner.run(dry.plans[0])
    part = runner._paused[0]
    rotation = part.step.rotation_of(0)
    assert isinstance(part.step, PrefillStep) and rotation
    held = part.hidden, part.angles, rotation.cos, rotation.sin, part.step._new.tensor(torch.device("cpu"))
    return sum(x.nbytes for x in held)


def test_what_a_paused_prompt_holds_is_what_is_counted(checkpoint: Path) -> None:
    cache = CacheConfig(num_blocks=200, block_size=4)
    asked = replace(small(checkpoint), parallel=ParallelConfig(), cache=cache)
    assert run_ranks(1, pause, asked) == [500 * PAUSED // 256]


def test_memory_that_ends_in_the_dry_run_is_told_with_what_helps(checkpoint: Path) -> None:
    with pytest.raises(RankFailed, match="the largest prefill of max_model_len=500 tokens"):
        run_ranks(1, ends, replace(small(checkpoint), parallel=ParallelConfig()))


def ends(asked: EngineConfig) -> None:
    """On a rank whose memory ends with the first layer."""
    no_more = mock.Mock(side_effect=torch.OutOfMemoryError("no more"))
    with told(), mock.patch.object(GptForward, "layer", no_more):
        build_engine(asked)


# Flags.


def serve_config(checkpoint: Path, *flags: object) -> EngineConfig:
    args = parse_args(["serve", "--checkpoint", str(checkpoint), *map(str, flags)])
    check_serve(args)
    return _serve_config(args)


def test_serve_measures_on_cuda_where_no_size_is_given(checkpoint: Path) -> None:
    asked = serve_config(checkpoint, "--device", "cuda")
    assert (asked.cache, asked.gpu_memory_utilization) == (None, 0.9)
    asked = serve_config(checkpoint, "--device", "cuda", "--gpu-memory-utilization", 0.5)
    assert (asked.cache, asked.gpu_memory_utilization) == (None, 0.5)
    for flags in (("--device", "cpu"), ("--device", "cuda", "--num-kv-blocks", 99)):
        asked = serve_config(checkpoint, *flags)
        assert asked.cache and asked.gpu_memory_utilization is None
    with pytest.raises(ValueError, match="--gpu-memory-utilization 1.5 must be above 0 and at most 1"):
        serve_config(checkpoint, "--gpu-memory-utilization", 1.5)


def test_fp8_rows_are_smaller_so_that_a_gib_holds_more_blocks(checkpoint: Path) -> None:
    flags = ("--kv-cache-gib", 0.01, "--max-model-len", 100, "--device", "cpu")
    whole, fp8 = (
        serve_config(checkpoint, *flags, "--kv-cache-dtype", kept).cache for kept in ("auto", "fp8")
    )
    assert whole and fp8
    # 8 numbers of 4 bytes, or 8 bytes and a scale.
    assert fp8.num_blocks == int(0.01 * GIB / (2 * 2 * 2 * 12 * 64)) and whole.num_blocks < fp8.num_blocks


def model_bytes(model: ModelConfig, kept: Any) -> int:
    return kv_layer_bytes(model, 1, "bfloat16", kept)


def test_a_row_of_fp8_is_its_numbers_and_a_scale() -> None:
    assert model_bytes(LLAMA, "auto") == 2 * 8 * 128 * 2 and model_bytes(LLAMA, "fp8") == 2 * 8 * (128 + 4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_device_is_filled_to_its_share_and_not_beyond(checkpoint: Path) -> None:
    asked = replace(small(checkpoint), parallel=ParallelConfig(), device="cuda", block_size=2**16)
    free, total = run_ranks(1, fill, asked)[0]
    assert 0.85 < (total - free) / total < 0.9


def fill(asked: EngineConfig) -> tuple[int, int]:
    """On a rank of a CUDA device: (free, total) bytes once the engine has answered."""
    answer(build_engine(asked))
    return torch.cuda.mem_get_info()
