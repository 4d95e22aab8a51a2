"""What a step costs: work counted from its plan, bytes by the formulas of traffic.py, prices of a profile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from megatron_sps2.attention.csa_plan import CsaPlan
from megatron_sps2.config import ModelConfig, ParallelConfig, SamplingParams
from megatron_sps2.csa_setting import PRESETS
from megatron_sps2.engine.plan import DecodeToken, NewPrompt, PrefillPiece, StepPlan
from megatron_sps2.parallel.traffic import Traffic
from megatron_sps2.simulator.attended import CsaKeys, causal_pairs
from megatron_sps2.simulator.cost import CostModel
from megatron_sps2.simulator.counter import Counter
from megatron_sps2.simulator.data_sheets import load_profile
from megatron_sps2.simulator.grid import Grid
from megatron_sps2.simulator.shapes import SHAPES
from megatron_sps2.simulator.work import Work

LLAMA = SHAPES["llama3-8b"]


def counter(sp: int = 1, tp: int = 1, per_node: int = 8, model: ModelConfig = LLAMA, **more: Any) -> Counter:
    parallel = ParallelConfig(sp_size=sp, tp_size=tp)
    return Counter(model=model, parallel=parallel, dtype="bfloat16", devices_per_node=per_node, **more)


def prompt(
    tokens: int, strategy: str = "ulysses", start: int = 0, layers: int = 32, home: int | None = None
) -> StepPlan:
    piece = PrefillPiece(
        request_id=0,
        start=start,
        stop=start + tokens,
        first_layer=0,
        last_layer=layers,
        strategy=strategy,
        home=home,
        prompt=NewPrompt(token_ids=(), params=SamplingParams()),
    )
    return StepPlan(pieces=(piece,))


def answers(batch: int, context: int, sp: int = 1, spread: bool = True) -> StepPlan:
    return StepPlan(
        decode=tuple(
            DecodeToken(
                request_id=i,
                token_id=0,
                position=context - 1,
                home=i % sp,
                kv_rank=i % sp,
                new_block=None,
                spread=spread,
            )
            for i in range(batch)
        )
    )


def test_attention_grows_by_the_square_of_the_prompt_and_matmuls_with_it() -> None:
    short, long = (counter().work(prompt(tokens), num_ended=0) for tokens in (8192, 16384))
    assert long.attention_flops / short.attention_flops == pytest.approx(4, rel=1e-3)
    assert long.matmul_flops / short.matmul_flops == pytest.approx(2)
    assert long.weight_bytes == short.weight_bytes


@pytest.mark.parametrize("strategy", ["ulysses", "pass_kv", "pass_q"])
def test_p_ranks_have_a_pth_of_the_work_each(strategy: str) -> None:
    alone = counter().work(prompt(32768, strategy), num_ended=0)
    eighth = counter(sp=8).work(prompt(32768, strategy), num_ended=0)
    assert eighth.attention_flops * 8 == pytest.approx(alone.attention_flops)
    assert eighth.matmul_flops * 8 == pytest.approx(alone.matmul_flops)


def test_control_uneven_heads_make_one_rank_the_busiest() -> None:
    model = replace(LLAMA, num_attention_heads=9, num_query_groups=3, head_dim=64)
    alone, half = (counter(sp=sp, model=model).work(prompt(4096), num_ended=0) for sp in (1, 2))
    assert half.attention_flops / alone.attention_flops == pytest.approx(6 / 9)


def test_a_short_prompt_on_one_rank_leaves_the_others_idle() -> None:
    alone = counter().work(prompt(512), num_ended=0)
    local = counter(sp=4).work(prompt(512, "local", home=2), num_ended=0)
    assert local.attention_flops == alone.attention_flops and local.matmul_flops == alone.matmul_flops
    assert local.bytes_sent == 0


@pytest.mark.parametrize("strategy", ["ulysses", "pass_kv", "pass_q"])
@pytest.mark.parametrize("tp", [1, 2])
def test_bytes_are_those_of_the_traffic_formulas(strategy: str, tp: int) -> None:
    model, parallel = LLAMA, ParallelConfig(sp_size=4, tp_size=tp)
    traffic = Traffic(model=model, parallel=parallel, element_size=2)
    work = counter(sp=4, tp=tp).work(prompt(8192, strategy), num_ended=0)
    exchanged = work.exchange_intra_bytes + work.exchange_inter_bytes
    assert exchanged == pytest.approx(32 * getattr(traffic, strategy)(8192))
    assert work.bytes_sent - exchanged == pytest.approx(32 * traffic.tp_all_reduce(8192))


def test_bytes_of_an_answers_token_are_those_of_the_formula_whatever_the_context() -> None:
    traffic = Traffic(model=LLAMA, parallel=ParallelConfig(sp_size=8), element_size=2)
    near, far = (counter(sp=8).work(answers(16, context, sp=8)) for context in (1000, 100_000))
    assert near.bytes_sent == far.bytes_sent == pytest.approx(32 * traffic.decode(16))
    assert counter(sp=8).work(answers(16, 1000, sp=8, spread=False)).bytes_sent == 0


def test_an_answer_reads_its_own_share_of_the_cache() -> None:
    alone, eighth = counter().work(answers(4, 80_000)), counter(sp=8).work(answers(4, 80_000, sp=8))
    row = 2 * LLAMA.num_query_groups * LLAMA.head_dim * 2
    assert alone.kv_bytes == pytest.approx(32 * 4 * 80_000 * row)
    assert eighth.kv_bytes * 8 == pytest.approx(alone.kv_bytes)


def test_an_answer_reads_fp8_rows_with_their_scales_and_sends_as_much_as_ever() -> None:
    whole, fp8 = (
        counter(sp=8, kv_cache_dtype=kept).work(answers(4, 80_000, sp=8)) for kept in ("auto", "fp8")
    )
    assert fp8.kv_bytes / whole.kv_bytes == pytest.approx((128 + 4) / (2 * 128))
    assert fp8.bytes_sent == whole.bytes_sent


def test_weights_are_those_of_the_shape() -> None:
    work = counter().work(answers(1, 10))
    assert work.weight_bytes == pytest.approx(2 * (8.03e9 - 128256 * 4096), rel=0.01)
    mixture = counter(model=SHAPES["mixtral-8x7b"])
    one, many = (mixture.work(answers(batch, 10)).weight_bytes for batch in (1, 64))
    assert many / one == pytest.approx(4, rel=0.1), "a token touches 2 of 8 experts, a batch all"


def test_windowed_layers_see_their_window() -> None:
    assert causal_pairs(0, 10) == 55 and causal_pairs(4, 6) == 5 + 6
    assert causal_pairs(0, 10, window=3) == 1 + 2 + 3 * 8
    model = replace(LLAMA, window=1024, window_layers=tuple(range(16)))
    whole, half = (counter(model=each).work(prompt(65536), num_ended=0) for each in (LLAMA, model))
    assert half.attention_flops / whole.attention_flops == pytest.approx(
        0.5 + 0.5 * 2 * 1024 / 65536, rel=0.01
    )


@pytest.mark.parametrize("strategy", ["ulysses", "csa"])
def test_a_windowed_layer_is_windowed_whatever_the_prompts_strategy(strategy: str) -> None:
    """On three ranks, where eight KV heads do not come apart evenly but tokens do."""
    model = replace(LLAMA, window=1024, window_layers=tuple(range(32)))
    work = counter(sp=3, model=model, csa=PRESETS["default"]).work(prompt(30720, strategy), num_ended=0)
    pairs = 32 * causal_pairs(0, 30720, 1024)
    assert work.attention_flops == pytest.approx(4 * pairs * LLAMA.num_attention_heads * LLAMA.head_dim / 3)
    assert work.intra_rounds == 32 * 2, "one collective a layer, of two rounds"
    traffic = Traffic(model=model, parallel=ParallelConfig(sp_size=3), element_size=2)
    sent = traffic.windowed(1024 * 5)
    assert work.bytes_sent == pytest.approx(32 * sent), "a window before each of five seams, not all keys"


def test_csa_spares_far_keys_and_full_csa_spares_none() -> None:
    pairs = causal_pairs(0, 131072)
    default, full = (CsaKeys.of(PRESETS[name], 131072) for name in ("default", "full"))
    assert default.pairs < pairs / 8
    assert pairs < full.pairs < 1.1 * pairs, "all keys, and the probes' price"
    assert default.share_sent(8) < full.share_sent(8) == 0.75
    assert CsaKeys.of(PRESETS["default"], 131072, beyond=1.0).pairs == pytest.approx(full.pairs)


@pytest.mark.parametrize(("num_tokens", "share"), [(8 * 512, 0.5), (16 * 512, 0.75)])
def test_full_csa_sends_what_its_layout_makes_it_send(num_tokens: int, share: float) -> None:
    """Contiguous up to 2P segments and zigzag from there: counted on the plan, of 8 ranks to 7 others."""
    setting = replace(PRESETS["full"], segment_size=512, max_segment_size=None)
    plan = CsaPlan(replace(setting, tail=0), num_tokens, 8)
    sent = sum(
        any(plan.owner[reader] == rank for reader in range(segment + 1, len(plan.segments)))
        for segment in range(len(plan.segments))
        for rank in range(8)
        if rank != plan.owner[segment]
    )
    assert sent / (7 * len(plan.segments)) == pytest.approx(share)
    assert CsaKeys.of(setting, num_tokens).share_sent(8) == pytest.approx(share)


def test_csa_costs_what_was_measured_of_it() -> None:
    """benchmarks/RESULTS.md: 2.42x and 4.14x exact prefill at 16K and 32K, linear layers included."""
    setting = replace(PRESETS["default"], segment_size=1024, max_segment_size=None)
    ratios = [causal_pairs(0, n) / CsaKeys.of(setting, n).pairs for n in (16384, 32768)]
    assert 3 < ratios[0] < ratios[1] < 9


def test_ranks_of_other_nodes_are_reached_by_the_slower_link() -> None:
    inside = Grid(parallel=ParallelConfig(sp_size=8), devices_per_node=8).exchange(700.0, 1)
    assert inside == Work(exchange_intra_bytes=700.0, intra_rounds=3)
    outside = Grid(parallel=ParallelConfig(sp_size=8, tp_size=4), devices_per_node=8).exchange(700.0, 1)
    assert outside == Work(exchange_intra_bytes=100.0, exchange_inter_bytes=600.0, inter_rounds=3)
    sums = Grid(parallel=ParallelConfig(sp_size=8, tp_size=4), devices_per_node=8).tp_sent(300.0, 2)
    assert sums == Work(sent_intra_bytes=300.0, intra_rounds=4)


def test_what_overlaps_takes_as_long_as_the_longer() -> None:
    base = load_profile("h100")
    work = counter(sp=8).work(prompt(131072, "pass_kv"), num_ended=0)
    hidden, shown = (
        CostModel(profile=replace(base, exchange_overlap=share), counter=counter(sp=8)).price(work)
        for share in (1.0, 0.0)
    )
    wire = work.exchange_intra_bytes / base.intra.bandwidth
    assert hidden.attention > wire and hidden.exchange == 0
    assert shown.exchange == pytest.approx(wire)
    assert shown.total - hidden.total == pytest.approx(wire)


def test_an_unknown_dtype_is_named() -> None:
    profile = replace(load_profile("h100"), matmul_flops={"bfloat16": 1e12})
    with pytest.raises(ValueError, match="no rates for float32; use --dtype bfloat16"):
        CostModel(profile=profile, counter=replace(counter(), dtype="float32"))
