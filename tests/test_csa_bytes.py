"""Bytes counted for virtual ranks from a run over one rank, against the ledgers of as many real ranks."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from megatron_sps2.attention.csa import CsaRun, csa
from megatron_sps2.attention.csa_plan import CsaPlan
from megatron_sps2.attention.csa_tally import CsaTally
from megatron_sps2.config import ModelConfig, ParallelConfig
from megatron_sps2.csa_setting import PRESETS, CsaSetting
from megatron_sps2.engine.csa_bytes import VirtualRanks
from megatron_sps2.parallel.collectives import Wire
from megatron_sps2.parallel.groups import Axis, ParallelGroups
from megatron_sps2.parallel.ledger import Ledger
from tests.ranks import run_ranks

NUM_LAYERS = 2
MODEL = ModelConfig(
    num_layers=NUM_LAYERS,
    hidden_size=96,
    ffn_hidden_size=32,
    num_attention_heads=6,
    num_query_groups=3,
    head_dim=16,
    vocab_size=32,
    max_seq_len=512,
)
SHAPE: dict[str, Any] = {"segment_size": 16, "num_sinks": 2, "window": 5, "tail": 7}
SETTINGS = {
    "strided": CsaSetting(selector="strided", group_sizes=(1, 2, 4), degrees=(1, 2, 5), **SHAPE),
    "fixed": CsaSetting(group_sizes=(1, 2, 4), degrees=(1, 3, 7), num_probes=4, **SHAPE),
    "adaptive": CsaSetting(floor=0.8, num_probes=4, **SHAPE),
    "growing": CsaSetting(floor=0.8, num_probes=4, max_segment_size=64, **SHAPE),
    "none": CsaSetting(selector="none", num_probes=0, **SHAPE),
}
# 16 segments and a short one: zigzag. 5 segments: contiguous on 3 and 4 ranks. 1 segment: nobody reads.
LENGTHS = [265, 77, 12]
ALONE = Axis(cast(Any, None), 0, 1, (0,))


def qkv(num_tokens: int, layer: int) -> list[Tensor]:
    """q [s, 1, n, d], k and v [s, 1, n_kv, d]; the same on every rank."""
    generator = torch.Generator().manual_seed(num_tokens + layer)
    return [2 * torch.randn(num_tokens, 1, heads, 16, generator=generator) for heads in (6, 3, 3)]


def run_csa(setting: CsaSetting, num_tokens: int, axis: Axis, **extra: Any) -> int:
    """Bytes that this rank sent over all layers."""
    plan, ledger = CsaPlan(setting, num_tokens, axis.size), Ledger()
    tally = CsaTally(NUM_LAYERS, MODEL.num_query_groups)
    run = CsaRun(plan=plan, wire=Wire(axis, ledger), scale=0.25, overlap=True, tally=tally, **extra)
    for layer in range(NUM_LAYERS):
        csa(*(x[plan.layout.positions(axis.rank)] for x in qkv(num_tokens, layer)), run, layer)
    return ledger.total_sent


def bytes_sent() -> dict[tuple[str, int], int]:
    """On a real rank, by setting and length."""
    axis = ParallelGroups.create(ParallelConfig(sp_size=torch.distributed.get_world_size())).sp
    return {
        (name, num_tokens): run_csa(setting, num_tokens, axis)
        for name, setting in SETTINGS.items()
        for num_tokens in LENGTHS
    }


def counted(setting: CsaSetting, num_tokens: int, num_ranks: int) -> VirtualRanks:
    ranks = VirtualRanks(
        setting=setting, num_tokens=num_tokens, num_ranks=num_ranks, model=MODEL, element_size=4
    )
    assert run_csa(setting, num_tokens, ALONE, observe=ranks.observe) == 0
    return ranks


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_virtual_ranks_send_what_the_ledgers_of_real_ones_hold(num_ranks: int) -> None:
    measured = run_ranks(num_ranks, bytes_sent)
    for name, setting in SETTINGS.items():
        for num_tokens in LENGTHS:
            want = [ledger[name, num_tokens] / NUM_LAYERS for ledger in measured]
            got = counted(setting, num_tokens, num_ranks).bytes_per_rank_per_layer()
            assert got == want, (name, num_tokens)


def test_control_fewer_selections_count_fewer_bytes() -> None:
    whole = counted(SETTINGS["adaptive"], 265, 4)
    partial = VirtualRanks(setting=whole.setting, num_tokens=265, num_ranks=4, model=MODEL, element_size=4)

    def observe_some(layer: int, heads: range, reader: int, kept: Tensor) -> None:
        if reader != 9:
            partial.observe(layer, heads, reader, kept)

    run_csa(whole.setting, 265, ALONE, observe=observe_some)
    assert sum(partial.bytes_per_rank_per_layer()) < sum(whole.bytes_per_rank_per_layer())


def test_the_ratio_to_pass_kv_counts_keys_and_index_by_hand() -> None:
    """Contiguous on 2 ranks with all kept: rank 0 sends its half once; pass_kv sends both halves."""
    setting = CsaSetting(
        selector="strided", degrees=(1, 1), segment_size=16, num_sinks=0, window=0, tail=0, num_probes=0
    )
    ranks = counted(setting, 48, 2)  # 2 segments and 1; the index of one bit a key comes on top
    index = 3 * 2 * 2
    sent = 32 * 3 * 2 * 16 * 4
    assert sum(ranks.bytes_per_rank_per_layer()) == sent + index
    assert ranks.ratio_to_pass_kv() == pytest.approx((sent + index) / (48 * 3 * 2 * 16 * 4))


def test_one_virtual_rank_sends_nothing() -> None:
    ranks = counted(SETTINGS["adaptive"], 77, 1)
    assert ranks.bytes_per_rank_per_layer() == [0]
    assert ranks.ratio_to_pass_kv() == 0


def test_the_papers_variant_is_refused() -> None:
    with pytest.raises(ValueError, match="dilated_bytes"):
        VirtualRanks(setting=PRESETS["paper"], num_tokens=64, num_ranks=8, model=MODEL, element_size=4)
