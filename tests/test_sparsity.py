"""Probes, scores and selectors against a plain softmax in fp64; no result depends on who shares a call."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from megatron_sps2.ops.sparsity import (
    Scored,
    above_floor,
    always_kept,
    best,
    own_log_sum,
    pack_bits,
    probe_rows,
    score,
    strided,
    total_log_sum,
    unpack_bits,
)

# fp32 scores of some tens, so a rounding of 1e-6 of them; shares are at most 1.
TOLERANCE = 1e-5
# (probes times query heads, segments, segment size, head_dim); the last one is a model's.
SIZES = [(1, 1, 8, 8), (6, 3, 16, 8), (12, 5, 32, 16), (48, 7, 128, 64)]


def drawn(p: int, m: int, size: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor, float]:
    """probes [p, d] and keys [m * G, d] that see each other unevenly, and the scale."""
    generator = torch.Generator().manual_seed(seed)
    probes, keys = (torch.randn(rows, d, generator=generator) for rows in (p, m * size))
    return 3 * probes, keys, d**-0.5


def masses(m: int, size: int, seed: int = 0) -> Tensor:
    """[m, G] shares that sum to at most 1, all different."""
    mass = torch.rand(m, size, generator=torch.Generator().manual_seed(seed)) ** 4
    return mass / mass.sum() * 0.9


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 16, 63, 512])
@pytest.mark.parametrize("num_probes", [1, 2, 3, 4, 7, 16, 600])
def test_probes_are_rising_rows_that_end_with_the_last_quarter(num_rows: int, num_probes: int) -> None:
    rows = probe_rows(num_rows, num_probes)
    num = min(num_rows, num_probes)
    last = math.ceil(num / 4)
    assert rows == sorted(set(rows)) and len(rows) == num
    assert rows[0] >= 0 and rows[-1] == num_rows - 1
    assert rows[-last:] == list(range(num_rows - last, num_rows))


def test_probes_before_the_last_quarter_lie_evenly() -> None:
    assert probe_rows(512, 16) == [*(i * 508 // 12 for i in range(12)), 508, 509, 510, 511]
    assert probe_rows(100, 1) == [99] and probe_rows(3, 16) == [0, 1, 2]


def test_no_rows_and_no_probes_give_no_probes() -> None:
    assert probe_rows(0, 16) == [] and probe_rows(512, 0) == []


@pytest.mark.parametrize(("p", "m", "size", "d"), SIZES)
def test_sums_and_mass_are_those_of_a_softmax(p: int, m: int, size: int, d: int) -> None:
    probes, keys, scale = drawn(p, m, size, d)
    scored = score(probes, keys, size, scale)
    scores = probes.double() @ keys.double().t() * scale
    log2_sums = torch.logsumexp(scores, 1) / math.log(2)
    torch.testing.assert_close(scored.log_sum(), log2_sums, atol=TOLERANCE, rtol=0)
    want = scores.softmax(1).mean(0).view(m, size)
    torch.testing.assert_close(scored.mass(log2_sums).double(), want, atol=TOLERANCE, rtol=TOLERANCE)


def test_mass_counts_keys_that_lie_elsewhere() -> None:
    probes, keys, scale = drawn(8, 6, 16, 8)
    whole = (probes.double() @ keys.double().t() * scale).softmax(1).mean(0).view(6, 16)
    first, second = score(probes, keys[:64], 16, scale), score(probes, keys[64:], 16, scale)
    total = total_log_sum(torch.stack([first.log_sum(), second.log_sum()]))
    found = torch.cat([first.mass(total), second.mass(total)])
    torch.testing.assert_close(found.double(), whole, atol=TOLERANCE, rtol=TOLERANCE)


def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    probes, keys, _ = drawn(4, 3, 16, 8)
    scored = score(probes, keys, 16, 300.0)
    scores = probes.double() @ keys.double().t() * 300.0
    mass = scored.mass(scored.log_sum())
    assert mass.isfinite().all() and abs(mass.sum().item() - 1) < 1e-3
    # fp32 scores of some thousands are off by a thousandth.
    torch.testing.assert_close(mass.double(), scores.softmax(1).mean(0).view(3, 16), atol=2e-3, rtol=0)


def test_without_keys_the_sum_is_minus_infinity_and_the_total_is_the_others() -> None:
    probes, keys, scale = drawn(5, 1, 16, 8)
    nothing = score(probes, keys[:0], 16, scale)
    assert nothing.log_sum().tolist() == [-math.inf] * 5
    some = score(probes, keys, 16, scale)
    total = total_log_sum(torch.stack([nothing.log_sum(), some.log_sum()]))
    torch.testing.assert_close(total, some.log_sum(), atol=0, rtol=1e-15)
    assert nothing.mass(total).shape == (0, 16)


@pytest.mark.parametrize("rows", [[0], [15], [0, 5, 14, 15]])
def test_own_sums_see_the_own_past_only(rows: list[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    keys, probes = torch.randn(16, 8, generator=generator), torch.randn(len(rows), 3, 8, generator=generator)
    found = own_log_sum(probes, rows, keys, 0.5).view(len(rows), 3)
    for i, row in enumerate(rows):
        scores = probes[i].double() @ keys[: row + 1].double().t() * 0.5
        torch.testing.assert_close(found[i], torch.logsumexp(scores, 1) / math.log(2), atol=1e-12, rtol=0)


def parts_of(m: int) -> list[list[slice]]:
    """Ways to deal m segments out to calls."""
    cuts = [[0, m], list(range(m + 1)), [0, 1, m], [0, m - 1, m], [0, m // 2, m]]
    return [[slice(a, b) for a, b in itertools.pairwise(sorted(set(cut)))] for cut in cuts]


@pytest.mark.parametrize(("p", "m", "size", "d"), [*SIZES, (9, 8, 512, 64), (64, 4, 512, 128)])
def test_no_bit_depends_on_which_segments_share_a_call(p: int, m: int, size: int, d: int) -> None:
    probes, keys, scale = drawn(p, m, size, d)
    whole = score(probes, keys, size, scale)
    total = whole.log_sum()
    mass = whole.mass(total)
    for parts in parts_of(m):
        pieces = [score(probes, keys[part.start * size : part.stop * size], size, scale) for part in parts]
        joined = Scored(
            torch.cat([piece.weights for piece in pieces], 1), torch.cat([piece.top for piece in pieces], 1)
        )
        assert torch.equal(joined.top, whole.top), f"top, {parts}"
        assert torch.equal(joined.weights, whole.weights), f"weights, {parts}"
        assert torch.equal(torch.cat([piece.mass(total) for piece in pieces]), mass), f"mass, {parts}"
        # Sums are in fp64, of sums that are the same to the bit.
        sums = total_log_sum(torch.stack([piece.log_sum() for piece in pieces]))
        torch.testing.assert_close(sums, total, atol=0, rtol=1e-14)


@pytest.mark.parametrize(("m", "size"), [(1, 8), (5, 32), (7, 512)])
def test_no_choice_depends_on_which_segments_share_a_call(m: int, size: int) -> None:
    mass, counts = masses(m, size), [1 + i % size for i in range(m)]
    floor, kept = above_floor(mass, 0.9, m), best(mass, counts)
    for part in (part for parts in parts_of(m) for part in parts):
        assert torch.equal(above_floor(mass[part], 0.9, m), floor[part])
        assert torch.equal(best(mass[part], counts[part]), kept[part])


@pytest.mark.parametrize("floor", [0.0, 0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("num_segments", [5, 40])
def test_a_floor_drops_at_most_its_allowance_and_one_key_more_would_pass_it(
    floor: float, num_segments: int
) -> None:
    mass = masses(5, 64)
    kept = above_floor(mass, floor, num_segments)
    allowed = (1 - floor) / num_segments
    dropped = mass.double().masked_fill(kept, 0.0).sum(1)
    assert (dropped <= allowed).all()
    least_kept = mass.masked_fill(~kept, torch.inf).min(1).values
    assert (dropped + least_kept > allowed).all()
    assert (mass.masked_fill(kept, 0.0).max(1).values < least_kept).all(), "what is dropped is the least"


def test_control_a_floor_drops_something_and_keeps_something() -> None:
    assert 0 < above_floor(masses(5, 64), 0.9, 5).sum() < 5 * 64


def test_a_floor_of_one_keeps_what_no_probe_sees_too() -> None:
    mass = torch.tensor([[0.0, 0.05]]).repeat(3, 8)
    assert above_floor(mass, 1.0, 3).all()
    assert torch.equal(above_floor(mass, 0.99999, 3), mass > 0)


def test_a_floor_drops_a_whole_segment_that_holds_less_than_its_allowance() -> None:
    mass = torch.stack([torch.full((16,), 1e-4), torch.full((16,), 0.05)])
    kept = above_floor(mass, 0.9, 2)
    assert not kept[0].any() and kept[1].all()


def test_the_best_are_as_many_as_wanted_and_have_the_most_mass() -> None:
    mass, counts = masses(5, 64), [0, 1, 17, 63, 64]
    kept = best(mass, counts)
    assert kept.sum(1).tolist() == counts
    for row, mask, count in zip(mass, kept, counts, strict=True):
        assert set(mask.nonzero().flatten().tolist()) == set(row.topk(count).indices.tolist())


def test_equals_of_the_last_best_are_kept_with_it() -> None:
    mass = torch.tensor([[0.5, 0.1, 0.1, 0.1, 0.0, 0.3, 0.0, 0.0]])
    assert best(mass, [3])[0].tolist() == [True, True, True, True, False, True, False, False]


@pytest.mark.parametrize("degree", [1, 2, 3, 8])
def test_heads_stagger_their_strides_and_cover_all_tokens_together(degree: int) -> None:
    positions = torch.arange(48, 96).view(3, 16)
    heads = [strided(positions, [degree] * 3, head) for head in range(degree)]
    assert torch.stack(heads).sum(0).eq(1).all(), "each token by one of them"
    for head, kept in enumerate(heads):
        assert (positions[kept] % degree == head).all()
    assert torch.equal(strided(positions, [degree] * 3, degree + 1), heads[1 % degree])


def test_each_segment_has_a_stride_of_its_own() -> None:
    positions = torch.arange(48).view(3, 16)
    kept = strided(positions, [1, 4, 8.0], 2)
    assert positions[kept].tolist() == [*range(16), 18, 22, 26, 30, 34, 42]


def test_sinks_and_the_window_before_the_reader_are_always_kept() -> None:
    positions = torch.arange(64).view(4, 16)
    assert positions[always_kept(positions, 64, 3, 20)].tolist() == [0, 1, 2, *range(44, 64)]
    assert positions[:2][always_kept(positions[:2], 64, 20, 5)].tolist() == [*range(20)]
    assert not always_kept(positions, 64, 0, 0).any()
    assert always_kept(positions, 64, 0, 100).all()


@pytest.mark.parametrize("shape", [(8,), (3, 16), (2, 5, 512), (0, 8), (4, 0, 16)])
def test_packed_bits_come_back(shape: tuple[int, ...]) -> None:
    bits = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.3
    packed = pack_bits(bits)
    assert packed.dtype == torch.uint8 and packed.shape == (*shape[:-1], shape[-1] // 8)
    assert torch.equal(unpack_bits(packed), bits)


def test_keys_without_mass_are_not_among_the_best() -> None:
    """Shares of very distant keys round to 0, thousands at a time: all would tie for the last place."""
    mass = torch.zeros(2, 16)
    mass[:, 3:6] = torch.tensor([0.1, 0.3, 0.2])
    assert best(mass, [8, 16]).sum(1).tolist() == [3, 16]
