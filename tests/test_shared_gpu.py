"""Two ranks on one CUDA device, over gloo: what tests elsewhere say of CPU ranks holds there too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_sps2.config import ParallelConfig
from megatron_sps2.parallel.collectives import Wire, broadcast_plan, heads_to_seq, seq_to_heads
from megatron_sps2.parallel.groups import ParallelGroups
from megatron_sps2.parallel.ledger import Ledger
from tests.ranks import run_ranks
from tests.sps2_command import answer, demo_flags

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
TOKENS, HEADS = [7, 4], [(0, 3), (3, 4)]


def _there_and_back() -> tuple[torch.Tensor, torch.Tensor, float, object]:
    """-> my tokens, the same after a round trip through heads, a sum over ranks, rank 0's plan."""
    wire = Wire(ParallelGroups.create(ParallelConfig(sp_size=2)).sp, Ledger())
    torch.manual_seed(wire.axis.rank)
    mine = torch.randn(TOKENS[wire.axis.rank], 1, 4, 16, dtype=torch.bfloat16, device="cuda")
    whole = seq_to_heads(mine, wire, TOKENS, HEADS).wait()
    back = torch.cat(heads_to_seq(whole, wire, TOKENS, [3, 1]).wait(), dim=2)
    total = torch.full((1,), wire.axis.rank + 1.0, device="cuda")
    dist.all_reduce(total, group=wire.axis.group)  # as Megatron's tensor parallelism does
    plan = broadcast_plan({"step": 7} if wire.axis.rank == 0 else None, wire, mine.device)
    return mine.cpu(), back.cpu(), total.item(), plan


def test_collectives_of_device_tensors_arrive() -> None:
    for mine, back, total, plan in run_ranks(2, _there_and_back):
        assert torch.equal(back, mine) and total == 3.0 and plan == {"step": 7}


def test_two_ranks_on_one_device_answer_as_on_the_cpu(tmp_path: Path) -> None:
    flags = demo_flags(tmp_path)
    shared = answer(*flags, "--device", "cuda", "--backend", "gloo")
    assert shared["token_ids"] == answer(*flags, "--device", "cpu")["token_ids"]
