"""Layers whose tokens see a window: the kernel, what crosses the wire, and every way of serving."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from checkpoints_tools.convert import convert
from megatron_sps2.attention.core import SequenceParallelAttention, StepContext
from megatron_sps2.attention.window import halo, halo_tokens
from megatron_sps2.config import ParallelConfig, ScheduleConfig
from megatron_sps2.csa_setting import PRESETS
from megatron_sps2.engine.build import EngineConfig, assemble, check_windows
from megatron_sps2.model.checkpoint import load_gpt
from megatron_sps2.model.manifest import load_model_config
from megatron_sps2.ops import window as ops
from megatron_sps2.ops.window import attend_window, attend_window_reference
from megatron_sps2.parallel.groups import ParallelGroups
from megatron_sps2.parallel.layout import TokenLayout, contiguous, on_one_rank, zigzag
from tests.ranks import run_ranks
from tests.sharded_run import Prompt as Asked
from tests.sharded_run import answer
from tests.test_engine import hf_greedy
from tests.test_policies_exact import (
    NUM_GENERATED,
    PROMPTS,
    Job,
    Served,
    run_job,
    schedule,
)
from tests.tiny_llama import prompt

WINDOW = 20
# Greedy ones of that file, whose answers transformers can tell.
ASKED = [i for i in range(len(PROMPTS)) if i not in (10, 11, 12)]


def positions(count: int, of: int, seed: int) -> Tensor:
    return torch.randperm(of, generator=torch.Generator().manual_seed(seed))[:count].sort().values


@pytest.mark.parametrize("window", [1, 7, 64, 1000])
@pytest.mark.parametrize(("sq", "sk"), [(1, 1), (1, 300), (50, 50), (300, 3), (70, 200), (3, 0)])
def test_the_kernel_equals_the_formula(
    sq: int, sk: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions with gaps, so that some queries see nothing."""
    monkeypatch.setattr(ops, "BLOCK_QUERIES", 32)
    q = torch.randn(sq, 2, 6, 16, generator=torch.Generator().manual_seed(1))
    k, v = (torch.randn(sk, 2, 2, 16, generator=torch.Generator().manual_seed(i)) for i in (2, 3))
    places = {"q_positions": positions(sq, 400, 4), "k_positions": positions(sk, 400, 5)}
    got = attend_window(q, k, v, scale=0.3, window=window, **places)
    want = attend_window_reference(q, k, v, scale=0.3, window=window, **places)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_bfloat16_is_rounded_once() -> None:
    q, k, v = (torch.randn(40, 1, 2, 16).bfloat16() for _ in range(3))
    places = {"q_positions": torch.arange(40), "k_positions": torch.arange(40)}
    got, _ = attend_window(q, k, v, scale=0.3, window=9, **places)
    want, _ = attend_window_reference(q.float(), k.float(), v.float(), scale=0.3, window=9, **places)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want.bfloat16(), atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("layout", [zigzag(100, 3), contiguous(100, 4), zigzag(7, 3), on_one_rank(50, 2, 1)])
@pytest.mark.parametrize("window", [1, 5, 40, 200])
def test_a_halo_is_what_a_rank_sees_and_does_not_hold(layout: TokenLayout, window: int) -> None:
    for rank in range(layout.num_ranks):
        held = set(layout.positions(rank))
        seen = {past for place in held for past in range(max(0, place - window + 1), place + 1)}
        found = [
            (place, run.rank, run.row + i)
            for run in halo(layout, rank, window)
            for i, place in enumerate(range(run.places.start, run.places.stop))
        ]
        assert sorted(place for place, _, _ in found) == sorted(seen - held)
        assert all(layout.find(place) == (holder, row) for place, holder, row in found)


class Reference:
    """A Gemma 3 whose window is shorter than most prompts, and transformers' answers."""

    def __init__(self, folder: Path) -> None:
        from tests.families import save_family

        self.hf: PreTrainedModel = save_family("gemma3", folder / "hf", sliding_window=WINDOW)
        self.checkpoint = str(folder / "megatron")
        convert(folder / "hf", self.checkpoint)

    @functools.cache  # noqa: B019  # as long as the module's fixture
    def tokens(self, ids: tuple[int, ...]) -> list[int]:
        with torch.inference_mode():
            return hf_greedy(self.hf, ids, NUM_GENERATED)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(tmp_path_factory.mktemp("windows"))


JOBS = {
    "sps2, recompute": Job(schedule("sps2")),
    "sps2, swap": Job(schedule("sps2", preemption="swap", layers_per_piece=3)),
    "sarathi": Job(schedule("sarathi", preemption="swap")),
    "fcfs": Job(schedule("fcfs"), is_small=False),
    "turns": Job(schedule("sps2", short_prompt_tokens=0), asks="turns"),
}


def serve(checkpoint: str, sp_size: int) -> dict[str, Served]:
    """On a rank: every job."""
    parallel = ParallelConfig(sp_size=sp_size)
    groups, found = ParallelGroups.create(parallel), {}
    for name, job in JOBS.items():
        context = StepContext()
        core = functools.partial(SequenceParallelAttention, context=context)
        forward = load_gpt(checkpoint, groups.to_megatron(), core, torch.float32)
        engine = assemble(job.config(checkpoint, parallel), groups, forward, context)
        found[name] = run_job(engine, job, 0)
    return found


@pytest.mark.parametrize("sp_size", [1, 2, 3])
def test_every_way_of_serving_equals_transformers(sp_size: int, reference: Reference) -> None:
    """Prompts that live on one rank, spread ones, chunks, what was computed again or swapped, next turns."""
    served = run_ranks(sp_size, serve, reference.checkpoint, sp_size)[0]
    for name, job in JOBS.items():
        if job.asks == "turns":
            continue
        for i in ASKED:
            wanted = reference.tokens(tuple(PROMPTS[i]))
            assert served[name].tokens[i] == wanted, f"{name}: prompt {i} of {len(PROMPTS[i])} tokens"
    for which, number in enumerate((2, 9)):
        ids = PROMPTS[number][:20]
        first = reference.tokens(tuple(ids))
        second = reference.tokens((*ids, *first, *range(5)))
        assert (served["turns"].tokens[which], served["turns"].tokens[2 + which]) == (first, second)
    assert sum(served["sps2, recompute"].preemptions) and served["sarathi"].num_swapped
    assert served["sarathi"].largest_chunk <= 48


def window_bytes(checkpoint: str, num_tokens: int) -> int:
    """On a rank: bytes that it sends in windowed layers while it prefills."""
    parallel = ParallelConfig(sp_size=2)
    config = EngineConfig(checkpoint=checkpoint, parallel=parallel, max_model_len=1000)
    groups, context = ParallelGroups.create(parallel), StepContext()
    core = functools.partial(SequenceParallelAttention, context=context)
    forward = load_gpt(checkpoint, groups.to_megatron(), core, torch.float32)
    engine = assemble(config, groups, forward, context)
    if engine.is_leader:
        answer(engine, [Asked(prompt(num_tokens, seed=1).tolist(), [])], 1)
    else:
        engine.follow()
    return engine.ledger.total("prefill", "exchange_window")


def test_what_crosses_the_wire_is_the_halo_whatever_the_prompts_length(reference: Reference) -> None:
    model = load_model_config(reference.checkpoint)
    sent = {n: sum(run_ranks(2, window_bytes, reference.checkpoint, n)) for n in (200, 800)}
    row = 2 * model.num_query_groups * model.head_dim * 4
    layout = contiguous if model.num_query_groups % 2 == 0 else zigzag  # ulysses, or pass_kv
    assert sent[200] == len(model.window_layers) * row * halo_tokens(layout(200, 2), WINDOW)
    assert sent[800] == sent[200] > 0


def test_what_windows_are_not_served_with_is_said(reference: Reference) -> None:
    model = load_model_config(reference.checkpoint)
    with pytest.raises(ValueError, match="CSA is not for this model: 2 of its layers .* last 20 tokens"):
        PRESETS["default"].check_model(model, "")
    caching = EngineConfig(checkpoint=reference.checkpoint, schedule=ScheduleConfig(prefix_caching=True))
    with pytest.raises(ValueError, match="prefix caching does not know windows"):
        check_windows(caching, model)
