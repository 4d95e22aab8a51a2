"""A whole layer of CSA with the Triton set: what the torch set gives, and no wait for the host on its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from megatron_sps2.attention.csa import CsaRun, csa  # noqa: E402
from megatron_sps2.attention.csa_plan import CsaPlan  # noqa: E402
from megatron_sps2.attention.csa_tally import CsaTally  # noqa: E402
from megatron_sps2.ops.kernel_set import TORCH, Kernels, triton_kernels  # noqa: E402
from megatron_sps2.ops.pack import Packing, Parcels, unite  # noqa: E402
from megatron_sps2.parallel.collectives import Wire  # noqa: E402
from megatron_sps2.parallel.groups import Axis  # noqa: E402
from megatron_sps2.parallel.ledger import Ledger  # noqa: E402
from tests.host_waits import HostWait, NoHostWaits  # noqa: E402
from tests.ranks import run_ranks  # noqa: E402
from tests.test_csa import (  # noqa: E402
    ALONE,
    LAYER,
    NUM_LAYERS,
    SCALE,
    SETTINGS,
    TOLERANCE,
    Case,
    Ran,
    at_sp_1,
    qkv,
    report_of,
    run_case,
    sp_axis,
    whole,
)

pytestmark = pytest.mark.triton
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="runs on CPU tensors, in Triton's interpreter"
)
CASES = [
    Case("strided", 57, 6, 2),
    Case("fixed by table", 57, 4, 4),
    Case("adaptive by table", 73, 4, 2),
    Case("adaptive, more probes than rows", 57, 3, 1),
    Case("none without probes", 57, 3, 1),
    Case("tail longer than the last segments", 73, 6, 2),
]


def same(found: list[Ran], case: Case) -> None:
    """What all ranks gave is what one rank gives with the torch set: outputs, keys kept and mass measured."""
    want = at_sp_1(case)
    torch.testing.assert_close(whole(found, case), want.out, atol=TOLERANCE, rtol=0)
    got, wanted = report_of(found), report_of([want])
    assert got.density_table == wanted.density_table
    for one, other in zip(got.mass_table[LAYER], wanted.mass_table[LAYER], strict=True):
        assert one == (other if other is None else pytest.approx(other, abs=1e-6)), case


@interpreted
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.setting)
def test_a_layer_is_the_torch_sets(case: Case) -> None:
    same([run_case(case, ALONE, kernels=triton_kernels())], case)


def run_on_rank(cases: list[Case]) -> list[Ran]:
    axis = sp_axis()
    return [
        run_case(case, axis, overlap=i % 2 == 0, kernels=triton_kernels()) for i, case in enumerate(cases)
    ]


@interpreted
def test_two_ranks_give_what_one_gives_with_the_torch_set() -> None:
    for case, found in zip(CASES[1:4], zip(*run_ranks(2, run_on_rank, CASES[1:4]), strict=True), strict=True):
        assert sum(ran.keys_sent for ran in found) > 0
        same(list(found), case)


@interpreted
def test_control_settings_differ_by_more_than_the_tolerance() -> None:
    case = CASES[2]
    other = at_sp_1(Case("strided", case.num_tokens, case.n, case.n_kv))
    assert (other.out - at_sp_1(case).out).abs().max() > 100 * TOLERANCE


def two_layers(
    kernels: Kernels,
    device: torch.device,
    watch: Callable[[], Any],
    case: Case = CASES[2],
    axis: Axis = ALONE,
) -> CsaTally:
    """The second one is watched: what is made once for a prompt is made by then."""
    plan, tally = CsaPlan(case.chosen, case.num_tokens, axis.size), CsaTally(NUM_LAYERS, case.n_kv, device)
    places = plan.layout.positions(axis.rank)
    tensors = [x[places].to(device) for x in qkv(case.num_tokens, case.n, case.n_kv)]
    wire = Wire(axis, Ledger())
    run = CsaRun(plan=plan, wire=wire, scale=SCALE, overlap=True, tally=tally, kernels=kernels)
    csa(*tensors, run, 0)
    with watch():
        csa(*tensors, run, LAYER)
    return tally


@interpreted
@pytest.mark.parametrize("case", CASES[1:5], ids=lambda case: case.setting)
def test_on_one_rank_no_operator_of_a_layer_waits_for_the_host(case: Case) -> None:
    tally = two_layers(triton_kernels(), torch.device("cpu"), NoHostWaits, case)
    assert tally.encode().isfinite().all()


def two_layers_on_rank(cases: list[Case], kernels: Kernels) -> None:
    for case in cases:
        two_layers(kernels, torch.device("cpu"), NoHostWaits, case, sp_axis())


@interpreted
def test_on_two_ranks_a_layer_waits_for_the_numbers_of_kept_keys_alone() -> None:
    """Which it reads as a list: what sizes of messages need, and the one thing that is let through here."""
    run_ranks(2, two_layers_on_rank, CASES[1:3], triton_kernels())


def waiting_unite(bits: Tensor, parcels: Parcels) -> Packing:
    found = unite(bits, parcels)
    assert found.first[-1].item() >= 0
    return found


@interpreted
def test_control_what_waits_is_noticed() -> None:
    with pytest.raises(HostWait):
        two_layers(TORCH, torch.device("cpu"), NoHostWaits)
    with pytest.raises(AssertionError, match=HostWait.__name__):
        run_ranks(2, two_layers_on_rank, CASES[1:2], replace(triton_kernels(), unite=waiting_unite))


@contextmanager
def cuda_waits_are_errors() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_on_a_gpu_a_layer_never_waits() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    assert two_layers(triton_kernels(), device, cuda_waits_are_errors).encode().isfinite().all()
    with pytest.raises(RuntimeError, match="synchroniz"):
        two_layers(TORCH, device, cuda_waits_are_errors)


@interpreted
def test_every_rule_is_among_the_cases() -> None:
    kinds = {(case.chosen.selector, case.chosen.is_adaptive) for case in CASES}
    assert kinds == {("strided", False), ("scored", False), ("scored", True), ("none", False)}
    assert all(case.setting in SETTINGS for case in CASES)
