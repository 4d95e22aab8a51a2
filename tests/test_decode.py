"""A decode batch on real ranks against attention over whole, unsharded K and V, and the bytes it sends."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sps2.attention.decode import DecodeRow, DecodeStep
from megatron_sps2.attention.kv_cache import KVCache
from megatron_sps2.config import CacheConfig, ModelConfig, ParallelConfig
from megatron_sps2.parallel.collectives import Wire
from megatron_sps2.parallel.groups import ParallelGroups
from megatron_sps2.parallel.ledger import Ledger
from megatron_sps2.parallel.traffic import Traffic
from tests.broken_wire import exchange_skipped
from tests.ranks import run_ranks

LAYERS, HEAD_DIM, BLOCK = 2, 16, 4
SCALE = HEAD_DIM**-0.5
NUM_STEPS = 3
# fp32: sums in another order over at most 80 keys. bf16: each partial and the result are rounded to 8 bits.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2**-6}
HEADS = {torch.float32: (9, 3), torch.bfloat16: (8, 2)}


@dataclass(frozen=True)
class Case:
    """A batch: cached tokens of each request, and whether its K and V are kept at home."""

    lengths: tuple[int, ...]
    kept_at_home: bool


# One request alone, fewer than ranks, more than ranks and uneven; a request of one token is on one rank only.
CASES = [
    Case((1,), True),
    Case((70,), False),
    Case((33, 1), False),
    Case((5, 64, 1, 17, 40, 2, 3), True),
    Case((5, 64, 1, 17, 40, 2, 3), False),
]


def whole(request: int, layer: int, num_tokens: int, n: int, n_kv: int, dtype: torch.dtype) -> list[Tensor]:
    """q [s, n, d], k and v [s, n_kv, d]; the same on every rank."""
    generator = torch.Generator().manual_seed(request * 10 + layer)
    return [
        torch.randn(num_tokens, heads, HEAD_DIM, generator=generator).to(dtype) for heads in (n, n_kv, n_kv)
    ]


def unsharded(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [n, d] of one token over k, v [s, n_kv, d] -> [n, d] in fp32, by torch's own attention."""
    q, k, v = q.float()[:, None], k.float().transpose(0, 1), v.float().transpose(0, 1)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)[:, 0]


class Batch:
    """Requests whose tokens lie anywhere: each token's rank is drawn, the same draw on every rank."""

    def __init__(self, case: Case, wire: Wire, dtype: torch.dtype) -> None:
        self.case, self.wire, self.dtype, (self.n, self.n_kv) = case, wire, dtype, HEADS[dtype]
        self.draw = random.Random(sum(case.lengths) + case.kept_at_home)
        config = CacheConfig(num_blocks=200, block_size=BLOCK)
        self.cache = KVCache(
            config, num_layers=LAYERS, num_kv_heads=self.n_kv, head_dim=HEAD_DIM, dtype=dtype
        )
        self.data = [
            [whole(i, layer, length + NUM_STEPS, self.n, self.n_kv, dtype) for layer in range(LAYERS)]
            for i, length in enumerate(case.lengths)
        ]
        free = self.draw.sample(range(200), 200)
        for i, length in enumerate(case.lengths):
            places = [self.draw.randrange(wire.axis.size) for _ in range(length)]
            mine = [place for place, rank in enumerate(places) if rank == wire.axis.rank]
            # Scattered blocks, with room for the new tokens as well.
            blocks = [free.pop() for _ in range(length // BLOCK + NUM_STEPS + 1)]
            self.cache.grant(i, blocks)
            runs = self.cache.extend(i, len(mine))
            for layer in range(LAYERS):
                _, k, v = self.data[i][layer]
                self.cache.write(layer, runs, k[mine], v[mine])

    def step(self, number: int) -> tuple[float, int]:
        """One decode step -> the largest error of the rows at home here, and the rows whose K and V moved."""
        axis = self.wire.axis
        ranks = [self.draw.randrange(axis.size) for _ in self.case.lengths]
        homes = [rank if self.case.kept_at_home else self.draw.randrange(axis.size) for rank in ranks]
        order = sorted(range(len(homes)), key=lambda i: homes[i])
        rows = [DecodeRow(i, homes[i], ranks[i]) for i in order]
        step = DecodeStep(cache=self.cache, wire=self.wire, rows=rows, scale=SCALE)
        mine = [i for i in order if homes[i] == axis.rank]
        worst = 0.0
        for layer in range(LAYERS):
            new = [self.case.lengths[i] + number for i in mine]
            q, k, v = (
                torch.stack([self.data[i][layer][which][t] for i, t in zip(mine, new, strict=True)])[:, None]
                if mine
                else torch.empty(0, 1, heads, HEAD_DIM, dtype=self.dtype)
                for which, heads in enumerate((self.n, self.n_kv, self.n_kv))
            )
            out = step.attend(layer, q, k, v)
            assert out.shape == q.shape and out.dtype == self.dtype
            for row, i, t in zip(out, mine, new, strict=True):
                queries, keys, values = self.data[i][layer]
                want = unsharded(queries[t], keys[: t + 1], values[: t + 1])
                error = ((row[0].float() - want).abs() / want.abs().clamp_min(1)).max().item()
                worst = max(worst, error if error == error else float("inf"))
        return worst, sum(row.home != row.kv_rank for row in rows)


Found = list[tuple[float, int, dict[str, int]]]


def decode(dtype: torch.dtype, skipped: bool) -> Found:
    """On a rank, for each case: the largest error over NUM_STEPS steps, rows moved, bytes sent."""
    axis, found = ParallelGroups.create(ParallelConfig(sp_size=dist.get_world_size())).sp, []
    for case in CASES:
        ledger = Ledger()
        batch = Batch(case, Wire(axis, ledger), dtype)
        with ledger.phase("decode"), exchange_skipped(skipped):
            steps = [batch.step(number) for number in range(NUM_STEPS)]
        found.append(
            (max(e for e, _ in steps), sum(moved for _, moved in steps), ledger.by_collective("decode"))
        )
    return found


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sp_size", [1, 2, 3, 4])
def test_decode_matches_unsharded_attention_and_sends_what_the_formula_says(
    dtype: torch.dtype, sp_size: int
) -> None:
    results: list[Found] = run_ranks(sp_size, decode, dtype, False)
    n, n_kv = HEADS[dtype]
    model = ModelConfig(
        num_layers=LAYERS,
        hidden_size=n * HEAD_DIM,
        ffn_hidden_size=1,
        num_attention_heads=n,
        num_query_groups=n_kv,
        head_dim=HEAD_DIM,
        vocab_size=1,
        max_seq_len=1,
    )
    traffic = Traffic(model=model, parallel=ParallelConfig(sp_size=sp_size), element_size=dtype.itemsize)
    for case, *found in zip(CASES, *results, strict=True):
        assert max(error for error, _, _ in found) < TOLERANCE[dtype], case
        moved = found[0][1]
        assert (moved == 0) == (case.kept_at_home or sp_size == 1), case
        sent = {
            name: sum(ledger.get(name, 0) for _, _, ledger in found) for _, _, led in found for name in led
        }
        # Exact: both formulas in the sum over ranks, and nothing else was sent.
        want_kv = LAYERS * traffic.moved_kv(moved)
        assert sent.pop("move_new_kv", 0) == want_kv
        want = LAYERS * NUM_STEPS * sp_size * traffic.decode(len(case.lengths))
        assert sum(sent.values()) == pytest.approx(want, abs=1e-6)
        assert set(sent) <= {"gather_queries", "return_partials"}


def test_control_without_exchange_the_result_is_wrong() -> None:
    results: list[Found] = run_ranks(3, decode, torch.float32, True)
    for case, *found in zip(CASES, *results, strict=True):
        # A request of one token, decoded at home, may lie whole on its home rank.
        assert max(error for error, _, _ in found) > 100 * TOLERANCE[torch.float32] or case.lengths == (1,)


def test_rows_out_of_order_are_refused() -> None:
    cache = KVCache(CacheConfig(num_blocks=1), num_layers=1, num_kv_heads=1, head_dim=2, dtype=torch.float32)
    rows = [DecodeRow(0, 1, 0), DecodeRow(1, 0, 0)]
    with pytest.raises(AssertionError, match="not sorted by home rank"):
        DecodeStep(cache=cache, wire=None, rows=rows, scale=1.0)  # type: ignore[arg-type]
