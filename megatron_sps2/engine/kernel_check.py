"""Every kernel of a set against the torch set, on this rank's device, before anything is served.

Small random inputs of the model's own heads. A kernel that a card, a driver or a compiler makes wrong would
otherwise give fluent nonsense, and nobody would be told.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_sps2.attention.csa import CsaRun, csa
from megatron_sps2.attention.csa_plan import CsaPlan
from megatron_sps2.attention.csa_routes import CsaRoutes
from megatron_sps2.attention.csa_tally import CsaTally
from megatron_sps2.csa_setting import CsaSetting
from megatron_sps2.ops.append import append_roped
from megatron_sps2.ops.attend import attend_reference
from megatron_sps2.ops.kernel_set import TORCH, Kernels, choose_kernels
from megatron_sps2.ops.kernels.fastest import attend_fastest, preferred_libraries
from megatron_sps2.ops.kernels.library import Library
from megatron_sps2.ops.merge import merge
from megatron_sps2.ops.paged import PagedKV, PagedRows, attend_paged_reference
from megatron_sps2.ops.rotation import Rotation
from megatron_sps2.parallel.collectives import Wire, gather_objects, tell_all
from megatron_sps2.parallel.groups import Axis
from megatron_sps2.parallel.ledger import Ledger

logger = logging.getLogger(__name__)

# Root mean square of the difference over that of what is right. bf16 rounds weights and outputs to 2^-9.
LIMITS = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 1e-4}
NUM_BLOCKS = 12
LONG_ROW = 2100
# Queries, keys and diagonals of prefill attention.
CALLS = ((200, 200, 0), (777, 777, 0), (150, 300, 150), (70, 300, 230), (140, 90, None), (16, 1100, None))


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """Of one tp rank, and how its cache keeps them."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    block_size: int
    fp8: bool
    device: torch.device


def settle_kernels(wanted: str, heads: Heads, world: Axis) -> Kernels:
    """The set that `wanted` means here, checked, with the libraries that are right on all ranks. Collective.

    Raises on every rank alike: RuntimeError where a kernel is off on any, ValueError for what cannot be.
    """
    kernels, problem, libraries = TORCH, "", list[Library]()
    try:
        kernels = choose_kernels(wanted, heads.device, heads.head_dim)
        if kernels.name != TORCH.name:
            check_kernels(kernels, heads)
            libraries = right_libraries(preferred_libraries(heads.device), heads)
    except ValueError:
        raise
    except WrongKernel as error:
        problem = str(error)
    except Exception as error:  # A compiler may fail in any way; the other ranks wait for this one's word.
        problem = f"kernels={wanted!r} cannot run here, use --kernels torch: {type(error).__name__}: {error}"
    everybody = gather_objects((kernels.name, {library.name for library in libraries}), world)
    if not problem and kernels.name != everybody[0][0]:
        problem = (
            f"kernels={wanted!r} means {kernels.name} here, but {everybody[0][0]} on rank 0; install the "
            "same packages everywhere, or use --kernels torch"
        )
    tell_all(problem, world)
    common = set.intersection(*(names for _, names in everybody))
    return _with(kernels, [library for library in libraries if library.name in common])


class WrongKernel(RuntimeError):
    """A kernel's numbers are off."""


def check_kernels(kernels: Kernels, heads: Heads) -> None:
    """Raises WrongKernel naming the kernel that differs from the torch set, and by how much."""
    limit = LIMITS[heads.dtype]
    for name, check in CHECKS.items():
        if all(getattr(kernels, each) is getattr(TORCH, each) for each in USES[name]):
            continue
        for found, wanted in check(kernels, heads):
            error = relative_error(found, wanted)
            if not error <= limit:  # NaN, too
                raise WrongKernel(
                    f"kernel {name} of the set {kernels.name!r} is off by {error:.1e}, over {limit:.0e}, "
                    f"with {heads}; use --kernels torch, and report it"
                )


def right_libraries(libraries: Sequence[Library], heads: Heads) -> list[Library]:
    """Those of `libraries` whose prefill attention is right here; others are logged."""
    trusted = list[Library]()
    for library in libraries:
        try:
            errors = [relative_error(*pair) for pair in _check_library(library, heads)]
        except Exception as problem:  # A library may fail in any way; ours is there, too.
            logger.warning("%s is not used for attention: %s", library.name, problem)
            continue
        if errors and all(error <= LIMITS[heads.dtype] for error in errors):
            trusted.append(library)
        elif errors:
            logger.warning("%s is not used for attention: off by %.1e", library.name, max(errors))
    return trusted


def _check_library(library: Library, heads: Heads) -> Iterator[tuple[Tensor, Tensor]]:
    for sq, sk, diagonal in CALLS:
        q, k, v = (x[:, None] for x in _qkv(heads, sq, sk))
        if library.fits(q, k, diagonal):
            x = {"scale": heads.head_dim**-0.5, "diagonal": diagonal}
            yield from zip(library.attend(q, k, v, **x), attend_reference(q, k, v, **x), strict=True)


def _with(kernels: Kernels, libraries: Sequence[Library]) -> Kernels:
    if not libraries:
        return kernels
    attend = functools.partial(attend_fastest, libraries=libraries, otherwise=kernels.attend)
    return replace(kernels, attend=attend)


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """0 for equal ones; NaN if any number is."""
    difference = (found.double() - wanted.double()).square().mean().sqrt()
    return float(difference / wanted.double().square().mean().sqrt().clamp_min(1e-30))


def _check_attend(kernels: Kernels, heads: Heads) -> Iterator[tuple[Tensor, Tensor]]:
    """Causal prompts, some that follow others, some queries over all keys."""
    for sq, sk, diagonal in CALLS:
        q, k, v = _qkv(heads, sq, sk)
        x = {"scale": heads.head_dim**-0.5, "diagonal": diagonal}
        found = kernels.attend(q[:, None], k[:, None], lambda v=v: v[:, None], **x)
        yield from zip(found, attend_reference(q[:, None], k[:, None], v[:, None], **x), strict=True)


def _check_merge(kernels: Kernels, heads: Heads) -> Iterator[tuple[Tensor, Tensor]]:
    outs = _random(heads, 3, 40, heads.num_heads, heads.head_dim)
    lses = _random(heads, 3, 40, heads.num_heads).float() * 3
    lses[1, :9] = -torch.inf
    yield from zip(kernels.merge(outs, lses), merge(outs, lses), strict=True)


def _check_paged(kernels: Kernels, heads: Heads) -> Iterator[tuple[Tensor, Tensor]]:
    """New tokens turned and kept, in blocks out of order; then rows of mixed lengths that read them."""
    size, device = heads.block_size, heads.device
    blocks = torch.randperm(NUM_BLOCKS, generator=torch.Generator().manual_seed(3)).tolist()
    slots = torch.tensor([block * size + i for block in blocks for i in range(size)], device=device)
    q, k, v = _qkv(heads, len(slots), len(slots))
    angles = torch.arange(len(slots), device=device)[:, None] * torch.rand(heads.head_dim, device=device)
    rotation = Rotation.of(angles, heads.dtype)
    kept, wanted = _pages(heads), _pages(heads)
    turned = append_roped(q, k, v, rotation, wanted, slots)
    if kernels.append_roped is not None:
        yield from zip(kernels.append_roped(q, k, v, rotation, kept, slots), turned, strict=True)
        yield from zip(
            (part.float() for part in kept.parts), (part.float() for part in wanted.parts), strict=True
        )
    last = len(slots) - 1
    long = blocks * -(-LONG_ROW // len(slots))  # the same tokens again and again: rows this long are cut
    tables = [blocks[:1], blocks, blocks, long]
    rows = PagedRows(tables, [0, 0, last // 2, 3], [1, last, last + 1, LONG_ROW], size)
    x = {"scale": heads.head_dim**-0.5}
    yield from zip(
        kernels.attend_paged(q[:4], wanted, rows, **x),
        attend_paged_reference(q[:4], wanted, rows, **x),
        strict=True,
    )


def _check_csa(kernels: Kernels, heads: Heads) -> Iterator[tuple[Tensor, Tensor]]:
    """A layer of a prompt of five segments: its keys scored, chosen and attended."""
    setting = CsaSetting(segment_size=64, num_sinks=2, window=9, tail=5, num_probes=8, floor=0.9)
    q, k, v = (x[:, None] for x in _qkv(heads, 300, 300))
    wire = Wire(Axis(None, 0, 1, (0,)), Ledger())  # type: ignore[arg-type]  # nothing travels
    outs = []
    for each in (kernels, TORCH):
        run = CsaRun(
            plan=CsaPlan(setting, len(q), 1),
            wire=wire,
            scale=heads.head_dim**-0.5,
            overlap=False,
            tally=CsaTally(1, heads.num_kv_heads, heads.device),
            kernels=each,
        )
        outs.append(csa(q, k, v, run, 0))
    yield outs[0], outs[1]


def _check_pack(kernels: Kernels, heads: Heads) -> Iterator[tuple[Tensor, Tensor]]:
    """What the first of two ranks sends of a prompt of nine segments, and that laid out again."""
    size = 128  # more than one program moves at a time, where heads have 64 numbers or more
    plan = CsaPlan(CsaSetting(segment_size=size), 9 * size, 2)
    routes = CsaRoutes(plan, 0, heads.device)
    _, k, v = (x.transpose(0, 1) for x in _qkv(heads, 1, plan.layout.tokens_per_rank[0]))
    bits = _random(heads, len(k), routes.scoring.num_tasks, size // 8).abs().mul(64).to(torch.uint8)
    packings = [each.unite(bits, routes.leaving) for each in (kernels, TORCH)]
    yield packings[0].first, packings[1].first
    yield packings[0].bits, packings[1].bits
    num_keys, ends = int(packings[1].first[-1]), []
    for each, packing in zip((kernels, TORCH), packings, strict=True):
        packed = each.pack(k, v, packing, routes.leaving, num_keys)
        whole = [torch.zeros(k.shape, dtype=k.dtype, device=k.device) for _ in "kv"]
        each.lay_out(packed, packing, routes.leaving, *whole)
        ends.append((packed, *whole))
    yield from zip(*ends, strict=True)


CHECKS: dict[str, Callable[[Kernels, Heads], Iterator[tuple[Tensor, Tensor]]]] = {
    "attend": _check_attend,
    "merge": _check_merge,
    "attend_paged": _check_paged,
    "csa": _check_csa,
    "pack": _check_pack,
}

# The functions of a set that a check is about.
USES = {
    "attend": ("attend",),
    "merge": ("merge",),
    "attend_paged": ("attend_paged", "append_roped"),
    "csa": ("attend", "key_selector", "attend_kept"),
    "pack": ("unite", "pack", "lay_out"),
}


def _qkv(heads: Heads, sq: int, sk: int) -> tuple[Tensor, Tensor, Tensor]:
    """q [sq, n, d], k and v [sk, n_kv, d]"""
    kv = (sk, heads.num_kv_heads, heads.head_dim)
    q = _random(heads, sq, heads.num_heads, heads.head_dim)
    return q, _random(heads, *kv, seed=1), _random(heads, *kv, seed=2)


def _random(heads: Heads, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(3 * sum(shape) + seed)
    return torch.randn(shape, generator=generator).to(heads.device, heads.dtype)


def _pages(heads: Heads) -> PagedKV:
    shape = heads.num_kv_heads, NUM_BLOCKS * heads.block_size, heads.head_dim
    dtype = torch.float8_e4m3fn if heads.fp8 else heads.dtype
    keys, values = (torch.zeros(shape, dtype=dtype, device=heads.device) for _ in "kv")
    if not heads.fp8:
        return PagedKV(keys, values, heads.block_size)
    scales = (torch.zeros(shape[:2], device=heads.device) for _ in "kv")
    return PagedKV(keys, values, heads.block_size, *scales)
