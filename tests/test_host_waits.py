"""No layer of an exact step waits for the host on its own: prefill by each strategy and decode, on two ranks.

The Triton set, by its interpreter. CSA's layers: test_csa_kernel_layers.py.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from megatron_sps2.attention.core import AttentionStep, PrefillStep  # noqa: E402
from megatron_sps2.attention.decode import DecodeRow, DecodeStep, RowHere  # noqa: E402
from megatron_sps2.attention.kv_cache import KVCache  # noqa: E402
from megatron_sps2.attention.static_decode import StaticBatch, StaticDecodeStep  # noqa: E402
from megatron_sps2.attention.window import NO_WINDOWS, Windows  # noqa: E402
from megatron_sps2.config import CacheConfig, KVCacheDType, ParallelConfig  # noqa: E402
from megatron_sps2.ops.append import append_roped  # noqa: E402
from megatron_sps2.ops.kernel_set import TORCH, triton_kernels  # noqa: E402
from megatron_sps2.ops.paged import NO_SLOT  # noqa: E402
from megatron_sps2.ops.rotation import Rotation  # noqa: E402
from megatron_sps2.parallel.collectives import Wire  # noqa: E402
from megatron_sps2.parallel.groups import ParallelGroups  # noqa: E402
from megatron_sps2.parallel.ledger import Ledger  # noqa: E402
from tests.host_waits import HostWait, NoHostWaits  # noqa: E402
from tests.ranks import run_ranks  # noqa: E402

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs on CPU tensors, in Triton's interpreter"),
]

NUM_RANKS, N, N_KV, DIM, BLOCK = 2, 4, 2, 16, 8
NUM_TOKENS, NUM_PAST = 70, 24
WINDOWS = Windows(9, frozenset((0, 1)))
KERNELS = triton_kernels()


def make_cache(kept: KVCacheDType) -> KVCache:
    cache = KVCache(
        CacheConfig(num_blocks=40, block_size=BLOCK),
        num_layers=2,
        num_kv_heads=N_KV,
        head_dim=DIM,
        dtype=torch.float32,
        kv_cache_dtype=kept,
    )
    for part in (part for layer in range(2) for part in cache.layer(layer).parts):
        part.zero_()
    return cache


def watch_second_layer(step: AttentionStep, num_rows: int) -> None:
    """What is made once for a step is made in the first layer."""
    rows = [torch.randn(num_rows, 1, heads, DIM) for heads in (N, N_KV, N_KV)]
    step.attend(0, *rows)
    with NoHostWaits():
        step.attend(1, *rows)


def prefill(strategy: str, num_past: int, kept: KVCacheDType, windows: Windows, changes: Any = None) -> None:
    """On a rank."""
    sp = ParallelGroups.create(ParallelConfig(sp_size=NUM_RANKS)).sp
    cache = make_cache(kept)
    cache.grant(0, list(range(20)))
    if num_past:
        mine = list(range(num_past // 2 * sp.rank, num_past // 2 * (sp.rank + 1)))
        cache.extend(0, len(mine), mine if windows.layers else ())
    step = PrefillStep(
        cache=cache,
        wire=Wire(sp, Ledger()),
        request_id=0,
        strategy=strategy,
        num_tokens=NUM_TOKENS,
        num_past=num_past,
        scale=DIM**-0.5,
        overlap=True,
        windows=windows,
        kernels=replace(KERNELS, **(changes or {})),
    )
    num_rows = step.layout.tokens_per_rank[sp.rank]
    step.rotation_of = lambda layer: Rotation.of(torch.rand(num_rows, DIM), torch.float32)
    watch_second_layer(step, num_rows)


def decode(kept: KVCacheDType, windows: Windows, changes: Any = None) -> None:
    """On a rank: a row that stays at home, one whose new K and V stay, and two that are kept elsewhere."""
    sp = ParallelGroups.create(ParallelConfig(sp_size=NUM_RANKS)).sp
    cache = make_cache(kept)
    rows = [
        DecodeRow(0, home=0, kv_rank=0, spread=False, position=40),
        DecodeRow(1, home=0, kv_rank=1, position=40),
        DecodeRow(2, home=1, kv_rank=1, position=40),
        DecodeRow(3, home=1, kv_rank=0, position=40),
    ]
    for row in rows:
        cache.grant(row.request_id, list(range(5 * row.request_id, 5 * row.request_id + 5)))
        cache.extend(row.request_id, 20, range(20) if windows.layers else ())
    step = DecodeStep(
        cache=cache,
        wire=Wire(sp, Ledger()),
        rows=rows,
        scale=DIM**-0.5,
        windows=windows,
        kernels=replace(KERNELS, **(changes or {})),
        rotation_of=lambda layer: Rotation.of(torch.rand(2, DIM), torch.float32),
    )
    watch_second_layer(step, step.home_counts[sp.rank])


@pytest.mark.parametrize(
    ("strategy", "num_past", "kept", "windows"),
    [
        ("ulysses", 0, "auto", NO_WINDOWS),
        ("pass_kv", 0, "fp8", NO_WINDOWS),
        ("pass_q", 0, "auto", NO_WINDOWS),
        ("pass_q", NUM_PAST, "fp8", NO_WINDOWS),
        ("pass_kv", 0, "auto", WINDOWS),
        ("pass_q", NUM_PAST, "fp8", WINDOWS),
    ],
)
def test_no_layer_of_a_prefill_waits(
    strategy: str, num_past: int, kept: KVCacheDType, windows: Windows
) -> None:
    run_ranks(NUM_RANKS, prefill, strategy, num_past, kept, windows)


@pytest.mark.parametrize(("kept", "windows"), [("auto", NO_WINDOWS), ("fp8", WINDOWS)])
def test_no_layer_of_a_decode_step_waits(kept: KVCacheDType, windows: Windows) -> None:
    run_ranks(NUM_RANKS, decode, kept, windows)


def recorded(windows: Windows, changes: Any = None) -> bool:
    """On a rank: the second layer of a recorded step waits for nothing; whether it is what torch gives."""
    sp = ParallelGroups.create(ParallelConfig(sp_size=NUM_RANKS)).sp
    torch.manual_seed(sp.rank)
    mine = [torch.randn(2, 1, heads, DIM) for heads in (N, N_KV, N_KV)]
    angles = torch.rand(2, DIM)
    outs = []
    for kernels in (replace(KERNELS, **(changes or {})), replace(TORCH, append_roped=append_roped)):
        cache, batch = make_cache("auto"), StaticBatch(NUM_RANKS, 2, 3, BLOCK, torch.device("cpu"))
        rows = [RowHere(slot, [i], sp.rank, 1) for i, slot in enumerate((0, NO_SLOT, 2 * BLOCK, 3 * BLOCK))]
        batch.fill(2, [1, 2], [3, 4], [rows[:2], rows[2:]])
        slots, shards, near = batch.rows(2)
        step = StaticDecodeStep(
            cache=cache,
            wire=Wire(sp, Ledger()),
            kernels=kernels,
            scale=DIM**-0.5,
            rotation_of=lambda layer: Rotation.of(angles, torch.float32),
            slots=slots,
            shards=shards,
            near=near,
            window_layers=windows.layers,
        )
        step.attend(0, *mine)
        with NoHostWaits() if kernels.name == KERNELS.name else nullcontext():
            outs.append(step.attend(1, *mine))
    return bool(torch.allclose(*outs, atol=1e-5))


@pytest.mark.parametrize("windows", [NO_WINDOWS, WINDOWS])
def test_no_layer_of_a_recorded_step_waits(windows: Windows) -> None:
    assert run_ranks(NUM_RANKS, recorded, windows) == [True] * NUM_RANKS


def waiting_merge(outs: torch.Tensor, lses: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    assert lses.amax().item() < 1e9
    return KERNELS.merge(outs, lses)


@pytest.mark.parametrize(
    ("step", "args"),
    [
        (prefill, ("pass_q", 0, "auto", NO_WINDOWS)),
        (decode, ("auto", NO_WINDOWS)),
        (recorded, (NO_WINDOWS,)),
    ],
)
def test_control_a_kernel_that_looks_at_a_number_is_noticed(step: Any, args: tuple[Any, ...]) -> None:
    with pytest.raises(AssertionError, match=HostWait.__name__):
        run_ranks(NUM_RANKS, step, *args, {"merge": waiting_merge})
