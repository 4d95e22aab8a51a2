"""Turning as Megatron turns, and keeping by slot: the torch functions that kernels are held against."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_sps2.model.rotary import rotary_angles
from megatron_sps2.ops.append import append, append_roped
from megatron_sps2.ops.paged import PagedKV, SlotRun, Slots, write_paged
from megatron_sps2.ops.quantized import quantize
from megatron_sps2.ops.rotation import Rotation, rotate

NUM_SLOTS = 48
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
aten = torch.ops.aten


class NoWaiting(TorchDispatchMode):
    """Fails where the host would have to wait for what a device holds."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (aten._local_scalar_dense.default, aten.nonzero.default), f"{func} waits"
        if func in (aten.index.Tensor, aten.index_put_.default):
            assert all(each is None or each.dtype != torch.bool for each in args[1]), (
                f"{func} by a mask waits"
            )
        return func(*args, **(kwargs or {}))


def make_kv(num_kv_heads: int, head_dim: int, dtype: torch.dtype, *, float8: bool = False) -> PagedKV:
    """Random numbers, so that what is not written can be told to have stayed."""
    shape = (num_kv_heads, NUM_SLOTS, head_dim)
    if not float8:
        return PagedKV(*(torch.randn(shape).to(dtype) for _ in "kv"), 16)
    (keys, key_scales), (values, value_scales) = (quantize(torch.randn(shape)) for _ in "kv")
    return PagedKV(keys, values, 16, key_scales, value_scales)


def contents(kv: PagedKV) -> list[Tensor]:
    """All that a cache holds, as bytes."""
    held = (kv.keys, kv.values, kv.key_scales, kv.value_scales)
    return [each.clone().view(torch.uint8) for each in held if each is not None]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary_dim"), [(64, 64), (80, 80), (96, 40)])
def test_turning_gives_every_bit_that_megatron_gives(
    head_dim: int, rotary_dim: int, dtype: torch.dtype
) -> None:
    x = torch.randn(50, 3, head_dim).to(dtype)
    angles = rotary_angles(torch.randint(1 << 20, (50,)), rotary_dim, 1e4)
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, apply_rope_fusion=False)
    group = object()  # of context parallelism; asked for nothing without packed sequences
    want = apply_rotary_pos_emb(x.unsqueeze(1), angles, config, cp_group=group)[:, 0]
    found = rotate(x, Rotation.of(angles, dtype))
    assert torch.equal(found.view(torch.uint8), want.contiguous().view(torch.uint8))


@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("slots", [[3, 0, 47, -1], [7, -1, 9], [-1, -1, 0, 5, 6], [-1] * 5, [9, 8, 7, 6], []])
def test_tokens_go_to_their_slots_and_to_no_other(slots: list[int], float8: bool) -> None:
    kv, (k, v) = make_kv(2, 64, torch.bfloat16, float8=float8), torch.randn(2, len(slots), 2, 64).bfloat16()
    want = copy.deepcopy(kv)
    for token, slot in enumerate(slots):
        if slot >= 0:
            put_one(want, slot, k[token], v[token])
    append(kv, torch.tensor(slots, dtype=torch.int64), k, v)
    assert same(contents(kv), contents(want))


def put_one(kv: PagedKV, slot: int, k: Tensor, v: Tensor) -> None:
    for held, scales, new in ((kv.keys, kv.key_scales, k), (kv.values, kv.value_scales, v)):
        if scales is None:
            held[:, slot] = new
        else:
            held[:, slot], scales[:, slot] = quantize(new)


def test_appending_by_slot_is_writing_by_runs() -> None:
    one, (k, v) = make_kv(2, 64, torch.float32), torch.randn(2, 7, 2, 64)
    other = copy.deepcopy(one)
    slots = Slots([SlotRun(3, 6), SlotRun(40, 44)])
    append(one, slots.tensor(one.keys.device), k, v)
    write_paged(other, slots, k, v)
    assert same(contents(one), contents(other))


def test_keys_are_kept_turned_and_inputs_stay_as_they_are() -> None:
    kv, q, (k, v) = make_kv(2, 64, torch.float32), torch.randn(4, 6, 64), torch.randn(2, 4, 2, 64)
    rotation, before = Rotation.of(torch.rand(4, 32).repeat(1, 2), torch.float32), (q.clone(), k.clone())
    turned_q, turned_k = append_roped(q, k, v, rotation, kv, torch.tensor([5, -1, 6, 7]))
    assert torch.equal(q, before[0]) and torch.equal(k, before[1])
    assert torch.equal(turned_q, rotate(q, rotation)) and torch.equal(turned_k, rotate(k, rotation))
    assert torch.equal(kv.keys[:, [5, 6, 7]], turned_k[[0, 2, 3]].transpose(0, 1))
    assert torch.equal(kv.values[:, [5, 6, 7]], v[[0, 2, 3]].transpose(0, 1))


@pytest.mark.parametrize("float8", [False, True])
def test_nobody_waits_for_the_device(float8: bool) -> None:
    kv, (q, k, v) = make_kv(2, 64, torch.float32, float8=float8), torch.randn(3, 4, 2, 64)
    rotation = Rotation.of(torch.rand(4, 64), torch.float32)
    slots = torch.tensor([3, -1, 4, 5])
    with NoWaiting():
        append_roped(q, k, v, rotation, kv, slots)
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        k[slots >= 0]
