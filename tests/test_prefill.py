"""Each prefill strategy on real ranks against unsharded attention, its pipeline, and its bytes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from megatron_sps2.attention.prefill import STRATEGIES, PrefillShape
from megatron_sps2.attention.strategy import LOCAL, choose_strategy, lay_out
from megatron_sps2.config import ModelConfig, ParallelConfig
from megatron_sps2.parallel.collectives import Wire
from megatron_sps2.parallel.groups import ParallelGroups
from megatron_sps2.parallel.layout import TokenLayout
from megatron_sps2.parallel.ledger import Ledger
from megatron_sps2.parallel.traffic import Traffic
from tests.broken_wire import exchange_skipped
from tests.ranks import run_ranks

HEAD_DIM = 16
SCALE = HEAD_DIM**-0.5
# fp32 sums in another order over at most a few hundred keys.
TOLERANCE = 2e-5
SPREAD = [strategy for strategy in STRATEGIES if strategy != LOCAL]


def whole_qkv(num_tokens: int, n: int, n_kv: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q [s, 1, n, d], k and v [s, 1, n_kv, d]; the same on every rank."""
    generator = torch.Generator().manual_seed(num_tokens)
    return [
        torch.randn(num_tokens, 1, heads, HEAD_DIM, generator=generator).to(dtype)
        for heads in (n, n_kv, n_kv)
    ]


def unsharded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own attention over whole tensors, causal over the last len(q) of len(k) tokens."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.permute(2, 0, 1, 3)


def layout_of(strategy: str, num_tokens: int, sp_size: int) -> TokenLayout:
    """A local prompt lives on the last rank."""
    return lay_out(strategy, num_tokens, sp_size, None, home=sp_size - 1 if strategy == LOCAL else None)


def shard_of_past(strategy: str, num_past: int, rank: int, sp_size: int) -> slice:
    """Of the tokens before the prompt: every P-th one, or all where a local prompt lives."""
    if strategy == LOCAL:
        return slice(0, num_past if rank == sp_size - 1 else 0)
    return slice(rank, num_past, sp_size)


def held(x: Tensor, layout: TokenLayout, rank: int) -> Tensor:
    return torch.cat([x[:0], *(x[segment.start : segment.stop] for segment in layout.segments[rank])])


def prefill_error(
    strategy: str, n: int, n_kv: int, lengths: list[int], num_past: int = 0, skipped: bool = False
) -> float:
    """On a rank: the largest error over `lengths`, both with and without overlap."""
    parallel = ParallelConfig(sp_size=torch.distributed.get_world_size())
    axis, ledger = ParallelGroups.create(parallel).sp, Ledger()
    worst = 0.0
    for num_tokens in lengths:
        q, k, v = whole_qkv(num_past + num_tokens, n, n_kv)
        layout = layout_of(strategy, num_tokens, axis.size)
        old = shard_of_past(strategy, num_past, axis.rank, axis.size)
        outs = []
        for overlap in (True, False):
            shape = PrefillShape(
                layout=layout,
                wire=Wire(axis, ledger),
                scale=SCALE,
                overlap=overlap,
                past=(k[old], v[old]) if num_past else None,
            )
            with exchange_skipped(skipped):
                mine = [held(x[num_past:], layout, axis.rank) for x in (q, k, v)]
                outs.append(STRATEGIES[strategy](*mine, shape))
        assert torch.equal(*outs), f"{strategy}: the pipeline changed the result at {num_tokens} tokens"
        want = held(unsharded(q[num_past:], k, v), layout, axis.rank)
        worst = max(worst, (outs[0] - want).abs().max().item() if len(want) else 0.0)
    return worst


LENGTHS = [1, 2, 7, 64, 257]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("n", "n_kv"), [(4, 4), (8, 2), (9, 3), (6, 6), (4, 1)])
@pytest.mark.parametrize("sp_size", [1, 2, 3, 4])
def test_strategy_matches_unsharded_attention_and_its_pipeline_changes_no_bit(
    strategy: str, n: int, n_kv: int, sp_size: int
) -> None:
    assert max(run_ranks(sp_size, prefill_error, strategy, n, n_kv, LENGTHS)) < TOLERANCE


@pytest.mark.parametrize("strategy", ["pass_q", LOCAL])
@pytest.mark.parametrize("sp_size", [1, 2, 3])
def test_a_prompt_follows_a_cached_context(sp_size: int, strategy: str) -> None:
    assert max(run_ranks(sp_size, prefill_error, strategy, 6, 2, [1, 5, 40], 71)) < TOLERANCE


def test_control_without_exchange_a_cached_context_is_missed() -> None:
    assert max(run_ranks(2, prefill_error, "pass_q", 6, 2, [40], 71, True)) > 100 * TOLERANCE


def pipeline_changes_a_bit(num_tokens: int, n: int, n_kv: int) -> list[str]:
    """On a rank: strategies and dtypes whose pipelined result is not bit for bit the unpipelined one."""
    parallel = ParallelConfig(sp_size=torch.distributed.get_world_size())
    axis, found = ParallelGroups.create(parallel).sp, []
    for strategy, dtype in itertools.product(STRATEGIES, (torch.float32, torch.bfloat16)):
        layout = layout_of(strategy, num_tokens, axis.size)
        mine = [held(x, layout, axis.rank) for x in whole_qkv(num_tokens, n, n_kv, dtype)]
        shapes = [
            PrefillShape(layout=layout, wire=Wire(axis, Ledger()), scale=SCALE, overlap=overlap)
            for overlap in (True, False)
        ]
        if not torch.equal(*(STRATEGIES[strategy](*mine, shape) for shape in shapes)):
            found.append(f"{strategy} {dtype}")
    return found


def test_the_pipeline_changes_no_bit_over_several_tiles_of_keys() -> None:
    """4,097 tokens: the engine pipelines from 1,024 on, and attention cuts keys into tiles of 2,048."""
    assert run_ranks(2, pipeline_changes_a_bit, 4097, 9, 3) == [[], []]


@pytest.mark.parametrize("strategy", SPREAD)
def test_control_without_exchange_the_result_is_wrong(strategy: str) -> None:
    errors = run_ranks(2, prefill_error, strategy, 8, 2, [64], 0, True)
    assert max(errors) > 100 * TOLERANCE


def test_a_local_prompt_needs_no_exchange_and_sends_nothing() -> None:
    assert max(run_ranks(2, prefill_error, LOCAL, 8, 2, [64], 71, True)) < TOLERANCE
    assert run_ranks(2, prefill_bytes, LOCAL, 64, 8, 2, True) == [0, 0]


def prefill_bytes(strategy: str, num_tokens: int, n: int, n_kv: int, overlap: bool) -> int:
    """On a rank: bytes sent by one prefill in bf16."""
    parallel = ParallelConfig(sp_size=torch.distributed.get_world_size())
    axis, ledger = ParallelGroups.create(parallel).sp, Ledger()
    layout = layout_of(strategy, num_tokens, axis.size)
    mine = [held(x, layout, axis.rank) for x in whole_qkv(num_tokens, n, n_kv, torch.bfloat16)]
    shape = PrefillShape(layout=layout, wire=Wire(axis, ledger), scale=SCALE, overlap=overlap)
    with ledger.phase("prefill"):
        STRATEGIES[strategy](*mine, shape)
    return ledger.total("prefill")


@pytest.mark.parametrize("strategy", SPREAD)
@pytest.mark.parametrize(("n", "n_kv", "sp_size"), [(4, 4, 2), (8, 4, 4), (9, 3, 2), (9, 3, 3), (6, 6, 4)])
@pytest.mark.parametrize("overlap", [True, False])
def test_bytes_sent_equal_the_formula(strategy: str, n: int, n_kv: int, sp_size: int, overlap: bool) -> None:
    num_tokens = 48 * sp_size  # A length that divides: the formula counts S/P tokens on each rank.
    sent = run_ranks(sp_size, prefill_bytes, strategy, num_tokens, n, n_kv, overlap)
    model = ModelConfig(
        num_layers=1,
        hidden_size=n * HEAD_DIM,
        ffn_hidden_size=1,
        num_attention_heads=n,
        num_query_groups=n_kv,
        head_dim=HEAD_DIM,
        vocab_size=1,
        max_seq_len=num_tokens,
    )
    formula = getattr(
        Traffic(model=model, parallel=ParallelConfig(sp_size=sp_size), element_size=2), strategy
    )
    # Exact: the formula is the mean over ranks, whose shares differ where heads split unevenly.
    assert sum(sent) == pytest.approx(sp_size * formula(num_tokens), abs=1e-6)


def test_auto_takes_the_strategy_that_fits() -> None:
    heads = {"num_heads": 8, "num_kv_heads": 4}
    assert choose_strategy("auto", **heads, sp_size=4, num_past=0) == "ulysses"
    assert choose_strategy("auto", **heads, sp_size=3, num_past=0) == "pass_kv"
    assert choose_strategy("auto", **heads, sp_size=4, num_past=9) == "pass_q"


def test_a_strategy_that_cannot_run_is_refused_with_the_fix() -> None:
    with pytest.raises(ValueError, match="3 query heads .* sp_size=4; use --strategy pass_kv"):
        choose_strategy("ulysses", num_heads=3, num_kv_heads=1, sp_size=4, num_past=0)
    with pytest.raises(ValueError, match="cannot prefill onto a cached context"):
        choose_strategy("pass_kv", num_heads=4, num_kv_heads=4, sp_size=2, num_past=8)
