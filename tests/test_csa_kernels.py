"""CSA's kernels against the loops of ops.kept: the same keys to the bit, scores and attention to rounding."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from megatron_sps2.ops import sparsity  # noqa: E402
from megatron_sps2.ops.keep_rule import KeepRule, RuleKind  # noqa: E402
from megatron_sps2.ops.kept import TorchSelector, attend_kept, by_rule, positions_of  # noqa: E402
from megatron_sps2.ops.kernels import csa_attend, csa_select  # noqa: E402
from megatron_sps2.ops.kernels.csa_list import list_kept  # noqa: E402
from megatron_sps2.ops.kernels.csa_select import TritonSelector, choose, limits_of  # noqa: E402
from megatron_sps2.ops.reads import Reads  # noqa: E402
from tests.csa_shapes import CPU, SHAPES, Shape, rule  # noqa: E402

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs on CPU tensors, in Triton's interpreter"),
]
KINDS: list[RuleKind] = ["none", "strided", "floor", "best"]
# Sinks and windows, by shape: none, less than a segment, and more than one.
ALWAYS = [(0, 0), (2, 5), (0, 0), (3, 20), (2, 5), (0, 50)]
SCALE = 0.4
# fp32 sums of some tens in another order.
TOLERANCE = 1e-5


def by_reference(mass: Tensor, keep: KeepRule, reads: Reads) -> tuple[Tensor, Tensor]:
    """mass [n_kv, tasks, G] -> bool masks and kept mass [n_kv, tasks]."""
    masks = torch.zeros(mass.shape, dtype=torch.bool)
    for i, reader in enumerate(reads.readers):
        positions = positions_of(reads, reader, CPU)
        start = reader.number * reads.segment_size
        always = sparsity.always_kept(positions, start, keep.num_sinks, keep.window)
        for head, shares in enumerate(mass[:, reads.tasks(i)]):
            masks[head, reads.tasks(i)] = always | by_rule(keep, reader, head, positions, shares, always)
    return masks, torch.where(masks, mass, 0.0).double().sum(2)


def drawn_mass(shape: Shape, reads: Reads, *, ties: bool) -> Tensor:
    """[n_kv, tasks, G] shares; with ties most are equal to some other or 0, and their sums exact."""
    generator = torch.Generator().manual_seed(shape.num_tokens)
    mass = torch.rand(shape.n_kv, reads.num_tasks, reads.segment_size, generator=generator) ** 6 / 32
    return (mass * 4096).floor() / 4096 if ties else mass


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_keys_are_kept_to_the_bit(kind: RuleKind, ties: bool) -> None:
    for shape, (num_sinks, window) in zip(SHAPES, ALWAYS, strict=True):
        reads = shape.routes.scoring
        mass = drawn_mass(shape, reads, ties=ties)
        keep = rule(kind, reads, shape.n_kv, num_sinks=num_sinks, window=window)
        want, want_mass = by_reference(mass, keep, reads)
        bits = torch.full((*mass.shape[:2], reads.segment_size // 8), 0xA5, dtype=torch.uint8)
        counts = torch.full(mass.shape[:2], -1, dtype=torch.int32)
        kept_mass = torch.full(mass.shape[:2], torch.nan, dtype=torch.float64)
        tasks = range(reads.num_tasks)
        choose(mass, limits_of(keep, reads, CPU), keep, reads, tasks, (bits, counts, kept_mass))
        assert torch.equal(sparsity.unpack_bits(bits), want), (shape, num_sinks, window)
        assert torch.equal(counts.long(), want.sum(2))
        torch.testing.assert_close(kept_mass, want_mass, atol=1e-12, rtol=0)


def test_control_rules_keep_some_and_leave_some_and_differ() -> None:
    reads = SHAPES[0].routes.scoring
    for ties in (False, True):
        mass = drawn_mass(SHAPES[0], reads, ties=ties)
        masks = [by_reference(mass, rule(kind, reads, 2), reads)[0] for kind in KINDS]
        assert all(0.02 < mask.double().mean() < 0.98 for mask in masks)
        assert all(not torch.equal(a, b) for i, a in enumerate(masks) for b in masks[:i])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probes_sums_are_the_references(dtype: torch.dtype) -> None:
    for shape in SHAPES:
        q, k, _ = dataclasses.replace(shape, dtype=dtype).drawn()
        routes = shape.routes
        probes = q.index_select(0, routes.own_probes)
        found = TritonSelector(k, routes.scoring, SCALE).score(probes)
        want = TorchSelector(k, routes.scoring, SCALE).score(probes)
        torch.testing.assert_close(found.here, want.here, atol=TOLERANCE, rtol=0)
        torch.testing.assert_close(found.own, want.own, atol=TOLERANCE, rtol=0)


def shares_by_reference(shape: Shape, probes: Tensor, k: Tensor, totals: Tensor) -> Tensor:
    """[n_kv, tasks, G]: each key's share of the probes' attention, from its definition, in fp64."""
    reads = shape.routes.scoring
    found = torch.zeros(shape.n_kv, reads.num_tasks, reads.segment_size, dtype=torch.float64)
    for i, reader in enumerate(reads.readers):
        rows, past = reads.probes(i), reader.num_past * reads.segment_size
        for head in range(shape.n_kv):
            mine = probes[rows, head * shape.group : (head + 1) * shape.group].double().flatten(0, 1)
            scores = mine @ k[head, :past].double().t() * SCALE
            shares = (scores - totals[head, rows].flatten()[:, None] * math.log(2)).exp().mean(0)
            found[head, reads.tasks(i)] = shares.unflatten(0, (-1, reads.segment_size))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shares_are_what_their_definition_gives(dtype: torch.dtype) -> None:
    """The mass kernel alone: for all tasks, for those of the last reader; totals that are off are seen."""
    for shape in SHAPES:
        q, k, _ = dataclasses.replace(shape, dtype=dtype).drawn()
        reads = shape.routes.scoring
        probes = q.index_select(0, shape.routes.own_probes)
        selector = TritonSelector(k, reads, SCALE)
        totals = selector.score(probes).here
        want = shares_by_reference(shape, probes, k, totals).float()
        for tasks in (range(reads.num_tasks), range(reads.first_task[-2], reads.num_tasks)):
            found = selector._mass(totals, tasks)
            torch.testing.assert_close(found, want[:, tasks.start :], atol=TOLERANCE, rtol=1e-4)
        off = selector._mass(totals + 0.01, range(reads.num_tasks))
        assert ((off - want).abs() > 1e-3 * want).all()


def test_readers_of_other_ranks_have_no_own_sum() -> None:
    routes = dataclasses.replace(
        SHAPES[0].routes, plan=dataclasses.replace(SHAPES[0].routes.plan, num_ranks=3), rank=1
    )
    q, k, _ = SHAPES[0].drawn()
    probes, k = q[: routes.scoring.num_probes], k[:, : routes.plan.layout.tokens_per_rank[1]]
    found = TritonSelector(k, routes.scoring, SCALE).score(probes)
    want = TorchSelector(k, routes.scoring, SCALE).score(probes)
    assert want.own.isinf().any() and not want.own.isinf().all()
    torch.testing.assert_close(found.here, want.here, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(found.own, want.own, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("kind", ["none", "floor"])
def test_a_selection_from_probes_to_bits_is_the_references(
    kind: RuleKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(csa_select, "MAX_SHARES", 150)  # some readers at a time
    for shape in SHAPES:
        q, k, _ = shape.drawn()
        routes, keep = shape.routes, rule(kind, shape.routes.scoring, shape.n_kv)
        probes, kept = q.index_select(0, routes.own_probes), []
        for selector in (TorchSelector, TritonSelector):
            chosen = selector(k, routes.scoring, SCALE)
            kept.append(chosen.select(chosen.score(probes).here, keep))
        want, found = kept
        assert torch.equal(found.bits, want.bits) and torch.equal(found.num_kept, want.num_kept), shape
        torch.testing.assert_close(found.mass, want.mass, atol=TOLERANCE, rtol=0)


def test_without_probes_nothing_is_measured_and_strides_are_kept() -> None:
    shape = SHAPES[0]
    _, k, _ = shape.drawn()
    reads = shape.routes.scoring
    want, found = (
        s(k, reads, SCALE).select(None, rule("strided", reads, 2)) for s in (TorchSelector, TritonSelector)
    )
    assert found.mass is None and torch.equal(found.bits, want.bits)
    assert torch.equal(found.num_kept, want.num_kept)


def drawn_bits(shape: Shape, reads: Reads, density: float) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    sizes = shape.n_kv, reads.num_tasks, reads.segment_size
    return sparsity.pack_bits(torch.rand(sizes, generator=generator) < density)


def test_lists_hold_the_rows_of_kept_keys_task_after_task() -> None:
    for shape in SHAPES:
        reads = shape.routes.attending
        bits = drawn_bits(shape, reads, 0.3)
        tasks = range(reads.num_tasks // 3, reads.num_tasks)
        listed = list_kept(bits, reads, tasks)
        masks = sparsity.unpack_bits(bits)[:, tasks.start :].flatten(0, 1)
        starts = reads.tensors(CPU).task_row[tasks.start :].repeat(shape.n_kv)
        want = [mask.nonzero().flatten() + start for mask, start in zip(masks, starts, strict=True)]
        assert listed.rows[: listed.first[-1]].tolist() == torch.cat(want).tolist()
        assert listed.first.diff().tolist() == [len(rows) for rows in want]


def attended(attend: object, shape: Shape, density: float, **extra: int) -> tuple[Tensor, int]:
    """Out [s, n, d] that began as NaN, and the number of pauses; keys that nobody keeps are NaN."""
    reads = shape.routes.attending
    q, k, v = shape.drawn()
    bits = drawn_bits(shape, reads, density)
    wanted = torch.zeros(shape.n_kv, shape.num_tokens, dtype=torch.bool)
    for i, reader in enumerate(reads.readers):
        masks = sparsity.unpack_bits(bits[:, reads.tasks(i)]).flatten(1)
        wanted[:, : masks.shape[1]] |= masks
        # The own segment's rows as far as there are queries: the others are the tail's, or of nobody here.
        start = reader.number * reads.segment_size
        wanted[:, start : start + reader.num_rows] = True
    k, v = (x.masked_fill(~wanted.unsqueeze(2), torch.nan) for x in (k, v))
    out = torch.full((shape.num_tokens, 2, *q.shape[1:]), torch.nan, dtype=q.dtype)[:, 1]
    pauses = list(attend(q, k, v, bits, reads, out, scale=SCALE, **extra))  # type: ignore[operator]
    return out, len(pauses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_attention_to_kept_keys_is_the_references(density: float, dtype: torch.dtype) -> None:
    for shape in (dataclasses.replace(shape, dtype=dtype) for shape in SHAPES):
        (want, _), (found, _) = (attended(f, shape, density) for f in (attend_kept, csa_attend.attend_kept))
        rows = sum(reader.num_rows for reader in shape.routes.attending.readers)
        assert int(want.isfinite().all(2).all(1).sum()) == rows
        # bf16 outputs, both parts of the reference and weights in the sums are rounded by 2^-9 of them each.
        near = {"atol": TOLERANCE, "rtol": 0.0} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2**-7}
        torch.testing.assert_close(found, want, **near, equal_nan=True)


def test_slices_of_readers_give_the_same_and_pause_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, once = attended(csa_attend.attend_kept, SHAPES[0], 0.3)
    parted, often = attended(csa_attend.attend_kept, SHAPES[0], 0.3, num_pauses=4)
    assert (once, often) == (1, 3) and torch.equal(parted.nan_to_num(), whole.nan_to_num())
    monkeypatch.setattr(csa_attend, "MAX_LISTED", 1)  # room for no reader: one at a time
    single, oftenest = attended(csa_attend.attend_kept, SHAPES[0], 0.3)
    assert oftenest == len(SHAPES[0].routes.attending.readers)
    assert torch.equal(single.nan_to_num(), whole.nan_to_num())
