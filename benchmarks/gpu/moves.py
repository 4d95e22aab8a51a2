"""Kernels that only move and mix: merging partials, turning and keeping new K and V, packing kept ones."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.case import Bench, Case, Row
from benchmarks.gpu.checks import LIMITS, compare, poisoned
from benchmarks.gpu.kernels import kernel, operation
from benchmarks.gpu.timing import milliseconds, num_sets

NUM_PARTS = 8
BLOCK_SIZE = 64
KEPT = 0.15  # of all keys


def cases(bench: Bench) -> Iterator[Case]:
    for rows in bench.pick(full=(64, 16384), quick=(64, 4096), tiny=(5,)):
        yield Case(name="merge", measure=partial(_merge, bench, rows))
    for tokens in bench.pick(full=(64, 8192), quick=(64, 8192), tiny=(7,)):
        for quantized in (False, True):
            yield Case(
                name="append and rotate" + (", fp8" if quantized else ""),
                measure=partial(_append, bench, tokens, quantized),
            )
    for tokens in bench.pick(full=(16384, 131072), quick=(16384,), tiny=(64,)):
        for way in ("pack", "lay out"):
            yield Case(name=f"{way} kept keys", measure=partial(_move_kept, bench, tokens, way))


def _heads(bench: Bench) -> tuple[int, int, int]:
    return bench.pick(full=(32, 8, 128), quick=(32, 8, 128), tiny=(4, 2, 16))


def _merge(bench: Bench, num_rows: int) -> Row:
    """Parts as they arrive: rows of outputs with their LSE behind, in one buffer of bytes."""
    merge, reference = kernel("merge", "merge_partials"), operation("merge", "merge")
    n, _, d = _heads(bench)
    num_bytes = NUM_PARTS * num_rows * n * (2 * d + 4)
    sets = [_parts(bench, num_rows, n, d) for _ in range(num_sets(num_bytes, bench.device))]
    with poisoned():
        out, lse = merge(*sets[0])
    wanted = reference(sets[0][0].double(), sets[0][1])
    check = compare((out, lse), ((out, wanted[0]), (lse, wanted[1])), LIMITS[torch.bfloat16])
    taken = milliseconds(lambda i: merge(*sets[i % len(sets)]), bench.device)
    moved = num_bytes + num_rows * n * (2 * d + 4)
    return Row(
        shape=f"{NUM_PARTS} parts of {num_rows} rows, {n} heads of {d}, bf16",
        milliseconds=taken,
        rate=moved / taken / 1e9,
        unit="TB/s",
        check=check,
    )


def _parts(bench: Bench, num_rows: int, n: int, d: int) -> tuple[Tensor, Tensor]:
    outs = torch.randn(NUM_PARTS, num_rows, n * d, device=bench.device).bfloat16()
    lses = torch.randn(NUM_PARTS, num_rows, n, device=bench.device)
    packed = torch.cat([outs.view(torch.uint8), lses.view(torch.uint8)], dim=2)
    views = packed[..., : 2 * n * d].view(torch.bfloat16), packed[..., 2 * n * d :].view(torch.float32)
    return views[0].unflatten(2, (n, d)), views[1]


def _append(bench: Bench, num_tokens: int, quantized: bool) -> Row:
    append, reference = kernel("append", "append_roped"), operation("append", "append_roped")
    rotation_type, kv_type = operation("rotation", "Rotation"), operation("paged", "PagedKV")
    n, n_kv, d = _heads(bench)
    device, dtype = bench.device, torch.bfloat16
    num_slots = -(-2 * num_tokens // BLOCK_SIZE) * BLOCK_SIZE
    num_bytes = num_tokens * d * 2 * (2 * n + 4 * n_kv)
    sets = [
        [torch.randn(num_tokens, heads, d, device=device, dtype=dtype) for heads in (n, n_kv, n_kv)]
        for _ in range(num_sets(num_bytes, device))
    ]
    rotation = rotation_type.of(1e3 * torch.rand(num_tokens, d, device=device), dtype)
    slots = torch.randperm(num_slots, device=device)[:num_tokens]

    def cache() -> object:
        kept = torch.float8_e4m3fn if quantized else dtype
        held = [torch.zeros(n_kv, num_slots, d, device=device, dtype=kept) for _ in range(2)]
        scales = [torch.zeros(n_kv, num_slots, device=device) if quantized else None for _ in range(2)]
        return kv_type(*held, BLOCK_SIZE, *scales)

    kv, wanted_kv = cache(), cache()
    with poisoned():
        q, k = append(*sets[0], rotation, kv, slots)
    wanted = reference(*sets[0], rotation, wanted_kv, slots)
    held, wanted_held = (
        [x.float() if s is None else x.float() * s[..., None] for x, s in _halves(each)]
        for each in (kv, wanted_kv)
    )
    pairs = list(zip((q, k, *held), (*wanted, *wanted_held), strict=True))
    check = compare((q, k, *held), pairs, LIMITS[dtype])
    taken = milliseconds(lambda i: append(*sets[i % len(sets)], rotation, kv, slots), device)
    kept_bytes = num_tokens * n_kv * 2 * (d + 4 if quantized else 2 * d)
    moved = num_tokens * d * 2 * (2 * n + 3 * n_kv) + kept_bytes
    return Row(
        shape=f"{num_tokens} tokens, {n}/{n_kv} heads of {d}, bf16",
        milliseconds=taken,
        rate=moved / taken / 1e9,
        unit="TB/s",
        check=check,
    )


def _move_kept(bench: Bench, num_tokens: int, way: str) -> Row:
    """Keys and values of a rank that one other rank keeps, into a message or out of it."""
    parcels_type, reference = operation("pack", "Parcels"), operation("pack", "pack")
    unite, pack, lay_out = (kernel("csa_pack", name) for name in ("unite", "pack", "lay_out"))
    _, n_kv, d = _heads(bench)
    device, dtype = bench.device, torch.bfloat16
    segment = bench.pick(full=1024, quick=1024, tiny=16)
    parcels = parcels_type.of(
        [[i] for i in range(num_tokens // segment)], range(0, num_tokens, segment), device
    )
    kept = torch.rand(n_kv, len(parcels), segment, device=device) < KEPT
    packing = unite(operation("sparsity", "pack_bits")(kept), parcels)
    num_keys = int(packing.first[-1])
    num_bytes = 2 * num_keys * 2 * d * dtype.itemsize  # read and written
    sets = [
        torch.randn(2, n_kv, num_tokens, d, device=device, dtype=dtype)
        for _ in range(num_sets(num_bytes, device))
    ]
    with poisoned():
        packed = pack(*sets[0], packing, parcels, num_keys)
    whole, wanted = torch.zeros_like(sets[0]), torch.where(kept.flatten(1)[..., None], sets[0], 0)
    lay_out(packed, packing, parcels, *whole)
    right = reference(*sets[0], packing, parcels, num_keys)
    check = compare((packed, whole), ((packed, right), (whole, wanted)), 0.0)
    messages = [pack(*each, packing, parcels, num_keys) for each in sets]

    def move(i: int) -> object:
        i %= len(sets)
        if way == "pack":
            return pack(*sets[i], packing, parcels, num_keys)
        return lay_out(messages[i], packing, parcels, *sets[i])

    taken = milliseconds(move, device)
    return Row(
        shape=f"{num_tokens} tokens, {n_kv} heads of {d}, bf16, {KEPT:.0%} kept",
        milliseconds=taken,
        rate=num_bytes / taken / 1e9,
        unit="TB/s",
        check=check,
    )


def _halves(kv: object) -> list[tuple[Tensor, Tensor | None]]:
    return [(kv.keys, kv.key_scales), (kv.values, kv.value_scales)]  # type: ignore[attr-defined]
