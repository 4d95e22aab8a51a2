"""The paper's dilated attention: its formula in one process, on real ranks, and its bytes."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from megatron_sps2.attention.dilated import dilated, dilated_bytes
from megatron_sps2.config import ParallelConfig
from megatron_sps2.ops.dilated import dilated_attention, paper_levels
from megatron_sps2.parallel.collectives import Wire
from megatron_sps2.parallel.groups import Axis, ParallelGroups
from megatron_sps2.parallel.layout import contiguous
from megatron_sps2.parallel.ledger import Ledger
from tests.broken_wire import exchange_skipped
from tests.ranks import run_ranks

HEAD_DIM = 16
SCALE = HEAD_DIM**-0.5
# fp32 sums in another order over at most a few hundred keys.
TOLERANCE = 1e-5
# (group sizes, degrees); the last ones sample few tokens of a short segment, or none.
LEVELS: dict[int, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {
    1: [((1,), (1,))],
    2: [((1, 2), (1, 2)), ((1, 2), (1, 40))],
    3: [((1, 3), (1, 3)), ((1, 3), (1, 1)), ((1, 3), (1, 23))],
    4: [((1, 2, 4), (1, 2, 4)), ((1, 4), (1, 3)), ((1, 2, 4), (1, 5, 17))],
}
# (n, n_kv), among them a KV head that ranks share and fewer query heads than ranks.
HEADS = [(9, 3), (4, 4), (8, 2), (3, 1), (2, 2)]
LENGTHS = [1, 3, 7, 66, 131]


def whole_qkv(
    num_tokens: int, n: int, n_kv: int, dtype: torch.dtype = torch.float32, b: int = 1, d: int = HEAD_DIM
) -> list[Tensor]:
    """q [s, b, n, d], k and v [s, b, n_kv, d]; the same on every rank."""
    generator = torch.Generator().manual_seed(num_tokens)
    return [torch.randn(num_tokens, b, heads, d, generator=generator).to(dtype) for heads in (n, n_kv, n_kv)]


def boundaries_of(num_tokens: int, num_segments: int) -> list[int]:
    return [0, *(held[0].stop for held in contiguous(num_tokens, num_segments).segments)]


def counted(
    q: Tensor, k: Tensor, v: Tensor, num_segments: int, levels: tuple, first_kv_head: int = 0
) -> Tensor:
    """The formula, key by key in fp64: sum c e^s v / sum c e^s, c the number of levels on which i sees j."""
    num_tokens, _, n, _ = q.shape
    position = torch.arange(num_tokens)
    segment = torch.tensor(
        [
            i
            for i, held in enumerate(contiguous(num_tokens, num_segments).segments)
            for _ in range(len(held[0]))
        ]
    )
    out = torch.empty(q.shape, dtype=torch.float64)
    for head in range(n):
        kv = head // (n // k.shape[2])
        count = torch.zeros(num_tokens, num_tokens, dtype=torch.float64)
        for size, degree in zip(*levels, strict=True):
            taken = position % degree == (first_kv_head + kv) % degree
            together = (segment // size)[:, None] == (segment // size)[None, :]
            count += together & taken[:, None] & taken[None, :] & (position[:, None] >= position[None, :])
        scores = torch.einsum("ibd,jbd->bij", q[:, :, head].double(), k[:, :, kv].double()) * SCALE
        weights = count * scores.exp()
        weights /= weights.sum(-1, keepdim=True)
        out[:, :, head] = torch.einsum("bij,jbd->ibd", weights, v[:, :, kv].double())
    return out


def emulated(qkv: list[Tensor], num_segments: int, levels: tuple, first_kv_head: int = 0) -> Tensor:
    boundaries = boundaries_of(len(qkv[0]), num_segments)
    return dilated_attention(
        *qkv,
        boundaries=boundaries,
        group_sizes=levels[0],
        degrees=levels[1],
        scale=SCALE,
        first_kv_head=first_kv_head,
    )


CASES = [(size, levels) for size, several in LEVELS.items() for levels in several]


@pytest.mark.parametrize(("num_segments", "levels"), [*CASES, (8, ((1, 2, 4, 8), (1, 2, 4, 8)))])
def test_one_process_gives_what_counting_key_by_key_gives(num_segments: int, levels: tuple) -> None:
    for (n, n_kv), num_tokens, first in itertools.product(HEADS, LENGTHS, (0, 5)):
        qkv = whole_qkv(num_tokens, n, n_kv, b=2)
        got, want = emulated(qkv, num_segments, levels, first), counted(*qkv, num_segments, levels, first)
        torch.testing.assert_close(got.double(), want, atol=TOLERANCE, rtol=0)


def test_one_level_over_one_segment_is_exact_causal_attention() -> None:
    q, k, v = whole_qkv(131, 9, 3)
    got = emulated([q, k, v], 1, ((1,), (1,)))
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q, k, v))
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got, want.permute(2, 0, 1, 3), atol=TOLERANCE, rtol=0)


def test_control_dilation_leaves_something_out() -> None:
    qkv = whole_qkv(131, 9, 3)
    exact = emulated(qkv, 1, ((1,), (1,)))
    assert (emulated(qkv, 4, LEVELS[4][0]) - exact).abs().max() > 0.1


def test_heads_sharded_over_tp_sample_what_unsharded_ones_do() -> None:
    q, k, v = whole_qkv(66, 9, 3)
    whole = emulated([q, k, v], 4, LEVELS[4][0])
    for kv in range(3):
        queries, own = slice(3 * kv, 3 * kv + 3), slice(kv, kv + 1)
        shard = emulated([q[:, :, queries], k[:, :, own], v[:, :, own]], 4, LEVELS[4][0], first_kv_head=kv)
        torch.testing.assert_close(shard, whole[:, :, queries], atol=TOLERANCE, rtol=0)


def sp_axis() -> Axis:
    return ParallelGroups.create(ParallelConfig(sp_size=torch.distributed.get_world_size())).sp


def on_my_rank(
    axis: Axis, qkv: list[Tensor], levels: tuple, ledger: Ledger, overlap: bool, first_kv_head: int
) -> tuple[Tensor, slice]:
    """On a rank: its output and where its tokens are."""
    layout = contiguous(len(qkv[0]), axis.size)
    held = layout.segments[axis.rank][0]
    mine = slice(held.start, held.stop)
    with ledger.phase("prefill"):
        out = dilated(
            *(x[mine] for x in qkv),
            layout=layout,
            wire=Wire(axis, ledger),
            scale=SCALE,
            group_sizes=levels[0],
            degrees=levels[1],
            first_kv_head=first_kv_head,
            overlap=overlap,
        )
    return out, mine


def rank_errors(heads: list[tuple[int, int]], lengths: list[int], skipped: bool = False) -> list[str]:
    """On a rank: the cases whose output is not the emulation's, or not the same without overlap."""
    axis, found = sp_axis(), []
    size = axis.size
    for levels, (n, n_kv), num_tokens in itertools.product(LEVELS[size], heads, lengths):
        first = num_tokens % 3
        qkv = whole_qkv(num_tokens, n, n_kv, b=2)
        with exchange_skipped(skipped):
            out, mine = on_my_rank(axis, qkv, levels, Ledger(), True, first)
            at_once, _ = on_my_rank(axis, qkv, levels, Ledger(), False, first)
        want = emulated(qkv, size, levels, first)[mine]
        case = f"levels {levels}, {n} heads, {n_kv} KV heads, {num_tokens} tokens"
        if not torch.equal(out, at_once):
            found.append(f"{case}: the pipeline changed a bit")
        if not torch.allclose(out, want, atol=TOLERANCE, rtol=0):
            found.append(f"{case}: off by {(out - want).abs().max()}")
    return found


@pytest.mark.parametrize("sp_size", [1, 2, 3, 4])
def test_ranks_give_what_one_process_gives(sp_size: int) -> None:
    assert run_ranks(sp_size, rank_errors, HEADS, LENGTHS) == [[]] * sp_size


@pytest.mark.parametrize("sp_size", [2, 4])
def test_control_without_exchange_the_result_is_wrong(sp_size: int) -> None:
    for found in run_ranks(sp_size, rank_errors, [(9, 3)], [131], True):
        assert any("off by" in line for line in found)


def sent_and_foretold(n: int, n_kv: int, num_tokens: int, dtype: torch.dtype) -> list[tuple[dict, dict]]:
    """On a rank, per setting and pipelining: bytes in the ledger and those that `dilated_bytes` gave."""
    axis, pairs = sp_axis(), []
    size = axis.size
    for levels, overlap in itertools.product(LEVELS[size], (True, False)):
        foretold = dilated_bytes(
            contiguous(num_tokens, size),
            axis.rank,
            num_heads=n,
            num_kv_heads=n_kv,
            head_dim=HEAD_DIM,
            element_size=dtype.itemsize,
            group_sizes=levels[0],
            degrees=levels[1],
            first_kv_head=1,
            batch_size=2,
        )
        ledger = Ledger()
        on_my_rank(axis, whole_qkv(num_tokens, n, n_kv, dtype, b=2), levels, ledger, overlap, 1)
        pairs.append((ledger.by_collective("prefill"), foretold))
    return pairs


@pytest.mark.parametrize("sp_size", [2, 3, 4])
@pytest.mark.parametrize(("n", "n_kv", "dtype"), [(9, 3, torch.bfloat16), (3, 1, torch.float32)])
def test_bytes_sent_are_those_foretold(sp_size: int, n: int, n_kv: int, dtype: torch.dtype) -> None:
    for pairs in run_ranks(sp_size, sent_and_foretold, n, n_kv, 67, dtype):
        for sent, foretold in pairs:
            assert sent == foretold


def test_bytes_of_a_case_counted_by_hand() -> None:
    """8 tokens on 2 ranks, 2 heads, degree 2: each rank samples 2 of its 4 tokens a head, sends one head's
    Q, K, V (2 rows of 3 x 16 fp32) and gives back 2 rows of 16 fp32 and an LSE."""
    heads = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "element_size": 4}
    for rank in range(2):
        assert dilated_bytes(contiguous(8, 2), rank, **heads, group_sizes=(1, 2), degrees=(1, 2)) == {
            "dilated_in": 2 * 3 * 64,
            "dilated_out": 2 * (64 + 4),
        }
    alone = dilated_bytes(contiguous(8, 1), 0, **heads, group_sizes=(1,), degrees=(1,))
    assert alone == {"dilated_in": 0, "dilated_out": 0}


def bf16_error(n: int, n_kv: int, d: int, num_tokens: int) -> float:
    """On a rank: the largest error of a bf16 run against fp64 over the same rounded inputs."""
    axis = sp_axis()
    size = axis.size
    qkv, levels = whole_qkv(num_tokens, n, n_kv, torch.bfloat16, d=d), LEVELS[size][0]
    want = counted(*qkv, size, levels)
    errors = []
    for overlap in (True, False):
        out, mine = on_my_rank(axis, qkv, levels, Ledger(), overlap, 0)
        assert out.dtype == torch.bfloat16
        errors.append((out.double() - want[mine]).abs().max().item())
    return max(errors)


@pytest.mark.parametrize(("n", "n_kv", "d"), [(9, 3, 16), (3, 1, 16), (3, 1, 5)])
def test_bfloat16_runs_on_ranks(n: int, n_kv: int, d: int) -> None:
    # Outputs up to about 4 in bf16 (8 bits): weights, each level's part and the merge are each rounded once.
    assert max(run_ranks(4, bf16_error, n, n_kv, d, 131)) < 0.03


@pytest.mark.parametrize("num_segments", [1, 2, 3, 4, 6, 8, 12])
def test_paper_levels_fit_any_number_of_segments(num_segments: int) -> None:
    levels = paper_levels(num_segments)
    qkv = whole_qkv(67, 2, 2)
    want = counted(*qkv, num_segments, levels)
    torch.testing.assert_close(emulated(qkv, num_segments, levels).double(), want, atol=TOLERANCE, rtol=0)
    if num_segments == 12:
        assert levels == ((1, 2, 4, 12), (1, 2, 4, 12))


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        (((1, 2, 4), (1, 2)), "must name one level each"),
        (((), ()), "at least level 0"),
        (((1, 2), (1, 2)), "end with the number of segments, 4"),
        (((2, 4), (1, 2)), "must start with 1"),
        (((1, 3, 4), (1, 2, 4)), "do not nest.*4 follows 3"),
        (((1, 4, 4), (1, 2, 4)), "4 follows 4"),
        (((1, 2, 4), (1, 2, 0)), "at least 1"),
        (((1, 2, 4), (2, 2, 4)), "level 0 is dense"),
    ],
)
def test_levels_that_make_no_sense_are_refused(levels: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        emulated(whole_qkv(8, 2, 2), 4, levels)
