"""The check of kernels before anything is served: right ones pass, each kind of wrong one is named."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from megatron_sps2.config import KernelChoice
from megatron_sps2.engine import kernel_check
from megatron_sps2.engine.kernel_check import CHECKS, Heads, check_kernels, right_libraries, settle_kernels
from megatron_sps2.ops import kernel_set
from megatron_sps2.ops.append import append_roped
from megatron_sps2.ops.kernel_set import TORCH, choose_kernels, numba_kernels, triton_kernels
from megatron_sps2.ops.kernels.fastest import attend_fastest
from megatron_sps2.ops.kernels.library import Library
from megatron_sps2.parallel.groups import world_axis
from tests.ranks import RankFailed, run_ranks
from tests.test_kernels_library import corner_attention

HEADS = Heads(
    num_heads=6,
    num_kv_heads=2,
    head_dim=16,
    dtype=torch.float32,
    block_size=8,
    fp8=False,
    device=torch.device("cpu"),
)
# Functions of the torch set itself are not checked: these are the same ones under other identities.
BY_SLOT = replace(
    TORCH,
    append_roped=append_roped,
    key_selector=type("Selector", (TORCH.key_selector,), {}),
    **{
        name: functools.partial(getattr(TORCH, name))
        for name in ("attend", "merge", "attend_paged", "attend_kept", "unite", "pack", "lay_out")
    },
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fp8", [False, True])
def test_the_torch_set_passes(dtype: torch.dtype, fp8: bool) -> None:
    check_kernels(BY_SLOT, replace(HEADS, dtype=dtype, fp8=fp8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fp8", [False, True])
def test_the_numba_set_passes(dtype: torch.dtype, fp8: bool) -> None:
    pytest.importorskip("numba")
    check_kernels(numba_kernels(), replace(HEADS, dtype=dtype, fp8=fp8))


def test_what_a_set_shares_with_torch_is_not_checked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = list[str]()

    def note(name: str) -> Callable[..., list[Any]]:
        def check(*_: object) -> list[Any]:
            checked.append(name)
            return []

        return check

    monkeypatch.setattr(kernel_check, "CHECKS", {name: note(name) for name in CHECKS})
    check_kernels(replace(TORCH, attend_paged=BY_SLOT.attend_paged), HEADS)
    check_kernels(replace(TORCH, key_selector=BY_SLOT.key_selector), HEADS)
    assert checked == ["attend_paged", "csa"]
    check_kernels(BY_SLOT, HEADS)
    assert checked[2:] == list(CHECKS)


@pytest.mark.triton
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs on CPU tensors, in Triton's interpreter")
@pytest.mark.parametrize(("fp8", "names"), [(False, CHECKS), (True, ("attend_paged",))])
def test_the_triton_set_passes(fp8: bool, names: Iterable[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the cache knows of float8."""
    pytest.importorskip("triton")
    monkeypatch.setattr(kernel_check, "CHECKS", {name: CHECKS[name] for name in names})
    check_kernels(triton_kernels(), replace(HEADS, fp8=fp8))


def late(name: str, spoil: Callable[[Any], Any]) -> dict[str, Any]:
    """A function of the set whose result is spoiled."""
    right = getattr(BY_SLOT, name)
    return {name: lambda *args, **more: spoil(right(*args, **more))}


def spoil_last(pair: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    pair[0][-1].mul_(3)
    return pair


def forget(*args: Any) -> Any:
    """Turns, and keeps nothing."""
    q, k, v, rotation, kv, slots = args
    return append_roped(q, k, v, rotation, kv, torch.full_like(slots, -1))


def library(name: str, run: Any) -> Library:
    return Library(name=name, package="torch", run=run, max_head_dim=128, square=False)


def test_libraries_that_are_right_here_come_first_and_others_are_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def raises(*_: Any) -> Any:
        raise NotImplementedError("no such card")

    bf16 = replace(HEADS, dtype=torch.bfloat16)
    wrong = library("wrong", lambda q, k, v, scale, causal: corner_attention(q, k, v, 2 * scale, causal))
    right = library("right", corner_attention)
    assert right_libraries([wrong, library("raises", raises), right], bf16) == [right]
    assert "wrong is not used for attention: off by" in caplog.text
    assert "raises is not used for attention: no such card" in caplog.text
    assert right_libraries([right], HEADS) == [], "libraries serve no fp32: nothing was tried"


def settle(missing_on: int | None, wanted: KernelChoice) -> str:
    """On a rank: the name of the set, where one of the ranks has no Numba."""
    if dist.get_rank() == missing_on:
        kernel_set.find_spec = lambda name: None  # type: ignore[assignment]
    return settle_kernels(wanted, HEADS, world_axis()).name


def test_ranks_that_would_compute_by_different_sets_are_named() -> None:
    pytest.importorskip("numba")
    assert run_ranks(2, settle, None, "auto") == ["numba"] * 2
    assert run_ranks(2, settle, 1, "torch") == ["torch"] * 2
    for rank, told in ((1, "means torch here, but numba on rank 0"), (0, "means numba here, but torch on")):
        with pytest.raises(RankFailed, match=f"rank 1: kernels='auto' {told}"):
            run_ranks(2, settle, rank, "auto")


def settle_broken() -> None:
    """On a rank: Numba cannot compile on rank 1."""
    if dist.get_rank() == 1:
        kernel_check.CHECKS = {"attend_paged": Mock(side_effect=OSError("no space left"))}
    settle_kernels("auto", HEADS, world_axis())


def test_a_compiler_that_fails_on_one_rank_is_told_on_all() -> None:
    """Both raise: a rank that waited for the other one would time out."""
    pytest.importorskip("numba")
    told = "rank 1: kernels='auto' cannot run here, use --kernels torch: OSError: no space left"
    with pytest.raises(RankFailed, match=told):
        run_ranks(2, settle_broken)


@pytest.mark.parametrize(
    ("name", "sq", "sk", "diagonal", "by_library"),
    [
        ("flash-attention-3", 128, 500, 372, True),
        ("flash-attention-3", 127, 500, 373, False),
        ("cudnn", 16384, 16384, 0, True),
        ("cudnn", 16383, 16383, 0, False),
        ("cudnn", 16384, 3, None, False),
    ],
)
def test_a_library_gets_the_calls_that_it_is_preferred_for(
    name: str, sq: int, sk: int, diagonal: int | None, by_library: bool
) -> None:
    q, k = (torch.empty(s, 1, 1, 16, dtype=torch.bfloat16) for s in (sq, sk))
    asked = library(name, lambda q, k, v, scale, causal: (q, q.new_zeros(1, 1, sq)))
    ours: list[int] = []

    def otherwise(*_: Any, **__: Any) -> Any:
        ours.append(1)
        return q, q

    attend_fastest(q, k, k, scale=1.0, diagonal=diagonal, libraries=[asked], otherwise=otherwise)
    assert (not ours) is by_library


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("attend", late("attend", spoil_last)),
        ("attend", {"attend": lambda q, k, v, **x: TORCH.attend(q, k, v, **{**x, "diagonal": None})}),
        ("attend", {"attend": lambda q, k, v, **x: TORCH.attend(q, k, k, **x)}),
        ("attend", late("attend", lambda pair: (pair[0] * torch.nan, pair[1]))),
        ("merge", late("merge", lambda pair: (pair[0], pair[1] + 1))),
        ("attend_paged", late("attend_paged", spoil_last)),
        ("attend_paged", late("append_roped", lambda pair: (pair[0], pair[1].flip(-1)))),
        ("attend_paged", {"append_roped": forget}),
        ("csa", {"attend_kept": lambda *_, **__: iter(())}),
        ("pack", late("unite", lambda packing: replace(packing, first=packing.first.flip(0)))),
        ("pack", late("unite", lambda packing: replace(packing, bits=packing.bits ^ 1))),
        ("pack", late("pack", lambda packed: packed.flip(1))),
        ("pack", {"lay_out": lambda *_: None}),
    ],
)
def test_control_a_wrong_kernel_is_named(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(RuntimeError, match=f"kernel {name} of the set 'torch' is off by .*--kernels torch"):
        check_kernels(replace(BY_SLOT, **changes), HEADS)


def test_heads_that_no_kernel_takes_are_left_to_torch_unless_triton_is_asked_for() -> None:
    """On a device; asked for, the set is tried, and says what it takes."""
    pytest.importorskip("triton")
    cuda = torch.device("cuda")
    assert [choose_kernels("auto", cuda, dim).name for dim in (8, 128, 256)] == ["triton"] * 3
    assert [choose_kernels("auto", cuda, dim).name for dim in (12, 264)] == ["torch"] * 2
    assert choose_kernels("triton", cuda, 12).name == "triton"
