"""CSA on real ranks: its definition at sp 1, the same at any sp, exact where nothing is dropped; bytes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from megatron_sps2.attention.csa import CsaRun, csa
from megatron_sps2.attention.csa_plan import CsaPlan
from megatron_sps2.attention.csa_tally import CsaReport, CsaTally, add_up
from megatron_sps2.config import ParallelConfig
from megatron_sps2.csa_setting import PRESETS, CsaSetting
from megatron_sps2.parallel.collectives import Wire
from megatron_sps2.parallel.groups import Axis, ParallelGroups
from megatron_sps2.parallel.ledger import Ledger
from tests.broken_wire import exchange_skipped
from tests.csa_reference import Defined, csa_by_definition, exact_attention
from tests.ranks import run_ranks

HEAD_DIM = 8
SCALE = HEAD_DIM**-0.5
# fp32 sums in another order over at most two hundred keys; outputs are of order 1. Measured below 3e-6.
TOLERANCE = 1e-5
LAYER, NUM_LAYERS = 1, 2
ALONE = Axis(cast(Any, None), 0, 1, (0,))

SHAPE: dict[str, Any] = {"segment_size": 16, "num_sinks": 2, "window": 5, "tail": 7, "num_probes": 5}
LEVELS: dict[str, Any] = {"group_sizes": (1, 2, 4), "degrees": (1, 2, 5)}
PLAIN = CsaSetting(**SHAPE, **LEVELS)
FLOORS = ((1.0, 1.0, 1.0, 1.0), (0.5, 0.95, 0.7, 1.0))
DENSITIES = (
    (((1.0, 1.0),) * 4),
    ((0.5, 0.1), (0.9, 0.0), (0.25, 1.0), (0.0, 0.33)),
)
SETTINGS: dict[str, CsaSetting] = {
    "none": replace(PLAIN, selector="none"),
    "none without probes": replace(PLAIN, selector="none", num_probes=0),
    "strided": replace(PLAIN, selector="strided"),
    "strided, nothing always kept, no tail": replace(
        PLAIN, selector="strided", num_sinks=0, window=0, tail=0
    ),
    "fixed": replace(PLAIN, degrees=(1, 1.5, 6.5)),
    "fixed by table": replace(PLAIN, densities=DENSITIES),
    "adaptive": replace(PLAIN, floor=0.8),
    "adaptive by table": replace(PLAIN, floors=FLOORS),
    "adaptive, one probe, large segments": replace(
        PLAIN, floor=0.9, num_probes=1, segment_size=32, window=40
    ),
    "adaptive, more probes than rows": replace(PLAIN, floor=0.9, num_probes=99, tail=3),
    # Of 16 for a prompt of 5 tokens, else of 32: 48 is no doubling.
    "growing segments": replace(PLAIN, floor=0.8, segment_size=8, max_segment_size=48, window=3),
    "tail longer than the last segments": replace(PLAIN, floor=0.9, tail=41),
    # Presets with a window and a tail that leave something far in a toy prompt.
    **{
        f"preset {name}": replace(
            preset, segment_size=16, max_segment_size=None, window=min(preset.window, 6), tail=9
        )
        for name, preset in PRESETS.items()
        if preset.selector != "dilated"
    },
}
# Three settings under which CSA is exact attention.
EXACT: dict[str, CsaSetting] = {
    "floor 1": replace(PLAIN, floor=1.0),
    "floors of 1": replace(PLAIN, floors=((1.0,) * 4,) * 2),
    "fixed, degrees of 1": replace(PLAIN, degrees=(1, 1, 1)),
    "strided, degrees of 1": replace(PLAIN, selector="strided", degrees=(1, 1, 1), num_probes=0),
    "full window": replace(PLAIN, selector="none", window=1000),
}
HEADS = [(9, 3), (8, 2), (4, 4)]
# Less than a segment, one, fewer segments than 4 ranks, as many, and two for each with a short last one.
LENGTHS = [5, 16, 40, 57, 131]


@dataclass(frozen=True)
class Case:
    setting: str
    num_tokens: int = 131
    n: int = 9
    n_kv: int = 3

    @property
    def chosen(self) -> CsaSetting:
        return (SETTINGS | EXACT)[self.setting]


# Every setting over a long prompt, and each over one of the short ones and of the other heads.
SHORT = itertools.cycle([(5, 4, 4), (40, 8, 2), (16, 9, 3), (57, 4, 4), (33, 8, 2), (129, 8, 2)])
CASES = [case for name in SETTINGS for case in (Case(name), Case(name, *next(SHORT)))]


@functools.cache
def qkv(num_tokens: int, n: int, n_kv: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [s, 1, n, d], k and v [s, 1, n_kv, d], the same on every rank; a few keys matter most."""
    generator = torch.Generator().manual_seed(num_tokens * 100 + n)
    q, k, v = (torch.randn(num_tokens, 1, heads, HEAD_DIM, generator=generator) for heads in (n, n_kv, n_kv))
    return 2 * q, k, v


@dataclass
class Ran:
    """What a rank has after one layer: its rows of the output, its counts, what it sent."""

    out: Tensor
    counts: Tensor
    sent: dict[str, int]
    keys_sent: int
    bytes_sent: int


def run_csa(
    setting: CsaSetting,
    tensors: tuple[Tensor, Tensor, Tensor],
    axis: Axis,
    overlap: bool = False,
    **extra: Any,
) -> Ran:
    """Takes its rows of whole q, k and v."""
    plan, ledger = CsaPlan(setting, len(tensors[0]), axis.size), Ledger()
    tally = CsaTally(NUM_LAYERS, tensors[1].shape[2])
    wire = Wire(axis, ledger)
    run = CsaRun(plan=plan, wire=wire, scale=SCALE, overlap=overlap, tally=tally, **extra)
    with ledger.phase("prefill"):
        out = csa(*(x[plan.layout.positions(axis.rank)] for x in tensors), run, LAYER)
    return Ran(out, tally.encode(), ledger.by_collective("prefill"), tally.keys_sent, tally.bytes_sent)


def run_case(case: Case, axis: Axis, **extra: Any) -> Ran:
    return run_csa(case.chosen, qkv(case.num_tokens, case.n, case.n_kv), axis, **extra)


def report_of(ranks: list[Ran]) -> CsaReport:
    """Of all ranks; only LAYER has run."""
    return add_up(
        torch.stack([ran.counts for ran in ranks]),
        tp_size=1,
        num_layers=NUM_LAYERS,
        setting="",
        bytes_exact=0,
        bytes_formula=lambda keys: keys,
    )


@functools.cache
def at_sp_1(case: Case) -> Ran:
    return run_case(case, ALONE)


@functools.cache
def defined(case: Case) -> Defined:
    return csa_by_definition(*qkv(case.num_tokens, case.n, case.n_kv), case.chosen, SCALE, LAYER)


def whole(ranks: list[Ran], case: Case) -> Tensor:
    """[s, 1, n, d] in order of position."""
    layout = CsaPlan(case.chosen, case.num_tokens, len(ranks)).layout
    out = torch.full((case.num_tokens, 1, case.n, HEAD_DIM), torch.nan)
    for rank, ran in enumerate(ranks):
        out[layout.positions(rank)] = ran.out
    return out


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """As on ranks: on toy tensors threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", SETTINGS)
def test_one_rank_gives_what_the_definition_gives(name: str) -> None:
    for num_tokens, (n, n_kv) in [*itertools.product(LENGTHS, HEADS[:1]), *((131, heads) for heads in HEADS)]:
        case, seen = Case(name, num_tokens, n, n_kv), dict[int, Tensor]()
        ran = run_case(
            case, ALONE, observe=lambda _, heads, reader, kept, seen=seen: seen.update({reader: kept})
        )
        want, report = defined(case), report_of([ran])
        torch.testing.assert_close(ran.out.double(), want.out, atol=TOLERANCE, rtol=0)
        for head in range(n_kv):
            kept = {reader: masks[head].flatten() for reader, masks in seen.items()}
            assert kept.keys() == want.kept[head].keys()
            assert all(torch.equal(kept[reader], want.kept[head][reader]) for reader in kept), case
            assert report.density_table[LAYER][head] == want.density[head]
            found = report.mass_table[LAYER][head]
            wanted = want.kept_mass[head]
            assert found == pytest.approx(wanted, abs=1e-5) if wanted == wanted else found is None, case
    assert report.density_table[0] == (1.0,) * n_kv, "the other layer has read nothing"


def test_control_the_definition_leaves_keys_out_and_settings_differ() -> None:
    outs = [
        defined(Case(name)).out for name in SETTINGS if name not in ("none without probes", "preset full")
    ]
    outs.append(exact_attention(*qkv(131, 9, 3), SCALE))
    for one, other in itertools.combinations(outs, 2):
        assert (one - other).abs().max() > 100 * TOLERANCE


def test_an_adaptive_setting_keeps_its_floor() -> None:
    """The mean over probes of every segment and head; the tail's queries do not count."""
    for name, floor in (("adaptive", 0.8), ("preset default", 0.9), ("preset fast", 0.8)):
        for n, n_kv in HEADS:
            assert min(defined(Case(name, 131, n, n_kv)).kept_mass) >= floor
            report = report_of([at_sp_1(Case(name, 131, n, n_kv))])
            assert all(mass is not None and floor <= mass < 1 for mass in report.mass_table[LAYER])


def exact_errors() -> list[tuple[str, float]]:
    """On a rank: the largest error of each setting that should be exact attention."""
    axis, found = sp_axis(), []
    for name, (n, n_kv), num_tokens in itertools.product(EXACT, HEADS[:2], (5, 40, 131)):
        case = Case(name, num_tokens, n, n_kv)
        ran = run_case(case, axis, overlap=True)
        places = CsaPlan(case.chosen, num_tokens, axis.size).layout.positions(axis.rank)
        want = exact_attention(*qkv(num_tokens, n, n_kv), SCALE)[places]
        found.append((f"{case}", (ran.out - want).abs().max().item() if places else 0.0))
    return found


def sp_axis() -> Axis:
    return ParallelGroups.create(ParallelConfig(sp_size=torch.distributed.get_world_size())).sp


@pytest.mark.parametrize("sp_size", [1, 2, 3, 4])
def test_where_nothing_is_dropped_csa_is_exact_attention(sp_size: int) -> None:
    for errors in run_ranks(sp_size, exact_errors):
        assert [error for error in errors if not error[1] < TOLERANCE] == []


def run_cases(cases: list[Case], skipped: bool = False) -> list[tuple[Ran, bool]]:
    """On a rank: every case, and whether the pipelined run gave the same to the bit."""
    axis, found = sp_axis(), []
    for case in cases:
        with exchange_skipped(skipped):
            plain, piped = (run_case(case, axis, overlap=overlap) for overlap in (False, True))
        same = torch.equal(plain.out, piped.out) and (plain.keys_sent, plain.sent) == (
            piped.keys_sent,
            piped.sent,
        )
        found.append((plain, same))
    return found


@functools.cache
def at_sp(sp_size: int) -> list[list[tuple[Ran, bool]]]:
    """By case, by rank."""
    return [[*ranks] for ranks in zip(*run_ranks(sp_size, run_cases, CASES), strict=True)]


SP_SIZES = pytest.mark.parametrize("sp_size", [2, 3, 4])


@SP_SIZES
def test_any_number_of_ranks_computes_what_one_computes(sp_size: int) -> None:
    for case, ranks in zip(CASES, at_sp(sp_size), strict=True):
        found = [ran for ran, _ in ranks]
        torch.testing.assert_close(
            whole(found, case), at_sp_1(case).out, atol=TOLERANCE, rtol=0, msg=str(case)
        )


@SP_SIZES
def test_any_number_of_ranks_keeps_and_measures_the_same(sp_size: int) -> None:
    for case, ranks in zip(CASES, at_sp(sp_size), strict=True):
        got, want = report_of([ran for ran, _ in ranks]), report_of([at_sp_1(case)])
        assert got.density_table == want.density_table and got.density == want.density, case
        for one, other in zip(got.mass_table[LAYER], want.mass_table[LAYER], strict=True):
            assert one == (other if other is None else pytest.approx(other, abs=1e-6)), case


@SP_SIZES
def test_the_pipeline_changes_no_bit_and_no_byte(sp_size: int) -> None:
    pairs = zip(CASES, at_sp(sp_size), strict=True)
    assert [case for case, ranks in pairs if not all(same for _, same in ranks)] == []


@SP_SIZES
def test_every_rank_sends_what_the_formula_says(sp_size: int) -> None:
    for case, ranks in zip(CASES, at_sp(sp_size), strict=True):
        plan = CsaPlan(case.chosen, case.num_tokens, sp_size)
        for rank, (ran, _) in enumerate(ranks):
            want = plan.message_bytes(
                rank, num_heads=case.n, num_kv_heads=case.n_kv, head_dim=HEAD_DIM, element_size=4
            )
            want["csa_kept"] = 2 * ran.keys_sent * HEAD_DIM * 4
            assert nonzero(ran.sent) == nonzero(want), (case, rank)
            assert ran.bytes_sent == sum(want.values())


def nonzero(sent: dict[str, int]) -> dict[str, int]:
    return {name: count for name, count in sent.items() if count}


def test_keys_sent_are_the_union_of_what_a_ranks_readers_keep() -> None:
    """Counted from the definition's masks: a key goes once to each other rank that reads it."""
    for case, ranks in zip(CASES, at_sp(3), strict=True):
        plan, kept = CsaPlan(case.chosen, case.num_tokens, 3), defined(case).kept
        for rank, (ran, _) in enumerate(ranks):
            held, sent = {*plan.layout.positions(rank)}, 0
            for head, to in itertools.product(kept, {*range(3)} - {rank}):
                masks = [keys for reader, keys in head.items() if plan.owner[reader] == to]
                wanted = {key for keys in masks for key in keys.nonzero().flatten().tolist()}
                sent += len(wanted & held)
            assert ran.keys_sent == sent, (case, rank)


def test_the_cases_hold_ranks_without_a_segment_and_ranks_without_a_reader() -> None:
    plans = [CsaPlan(case.chosen, case.num_tokens, 4) for case in CASES]
    assert any(not held for plan in plans for held in plan.held)
    assert any(plan.held[rank] and not plan.readers_of(rank) for plan in plans for rank in range(4))
    assert any(len(held) > 2 for plan in plans for held in plan.held)


def test_control_without_exchange_the_result_is_wrong() -> None:
    cases = [case for case in CASES if case.num_tokens == 131]
    for case, ranks in zip(cases, zip(*run_ranks(2, run_cases, cases, True), strict=True), strict=True):
        error = (whole([ran for ran, _ in ranks], case) - at_sp_1(case).out).abs().max()
        assert error > 100 * TOLERANCE, case


@pytest.mark.parametrize("name", SETTINGS)
def test_heads_split_over_tp_give_what_they_give_together(name: str) -> None:
    case = Case(name, 131, 8, 4)
    q, k, v = qkv(131, 8, 4)
    together, parts = run_csa(case.chosen, (q, k, v), ALONE), []
    for first in (0, 2):
        tensors = q[:, :, 2 * first : 2 * first + 4], k[:, :, first : first + 2], v[:, :, first : first + 2]
        parts.append(run_csa(case.chosen, tensors, ALONE, first_kv_head=first))
    assert torch.equal(torch.cat([part.out for part in parts], dim=2), together.out)
    density = [head for part in parts for head in report_of([part]).density_table[LAYER]]
    assert tuple(density) == report_of([together]).density_table[LAYER]


@pytest.mark.parametrize("name", ["strided", "fixed by table", "adaptive by table"])
def test_control_heads_of_the_model_have_their_own_strides_and_budgets(name: str) -> None:
    first, second = (
        run_csa(SETTINGS[name], qkv(131, 4, 2), ALONE, first_kv_head=head).out for head in (0, 1)
    )
    assert (first - second).abs().max() > 100 * TOLERANCE


def half_precision_errors() -> list[tuple[str, float]]:
    """On a rank: bf16 against fp32 of the same rounded numbers, so that the same keys are kept."""
    axis, found = sp_axis(), []
    for name in ("strided", "fixed", "adaptive", "preset default"):
        tensors = [x.bfloat16() for x in qkv(131, 9, 3)]
        halves = run_csa(SETTINGS[name], cast(Any, tensors), axis, overlap=True)
        floats = run_csa(SETTINGS[name], cast(Any, [x.float() for x in tensors]), axis, overlap=True)
        assert halves.out.dtype == torch.bfloat16 and halves.keys_sent == floats.keys_sent
        assert halves.sent["csa_kept"] == floats.sent["csa_kept"] // 2
        found.append((name, (halves.out.float() - floats.out).abs().max().item()))
    return found


def test_bf16_is_close_to_fp32() -> None:
    for errors in run_ranks(2, half_precision_errors):
        # Outputs of up to 3 in bf16 are rounded by 2^-7, and values once more within the sums.
        assert [error for error in errors if not error[1] < 3e-2] == []
