"""The kernels and sizes that production launches on an H100 or H200, to be compiled for it without one."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from megatron_sps2.ops.kernels.tiles import Tiles, choose_tiles
from tests.kernel_cases_csa import csa_cases

HOPPER = (9, 0)
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One compilation of `kernel` in `module` (under megatron_sps2.ops.kernels).

    `signature` gives the type of each argument that is not a constant, as Triton writes it. Pointers and the
    arguments named in `aligned` are multiples of 16, as Triton finds them in a launch.
    """

    name: str
    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[str, object]
    num_warps: int
    num_stages: int = 1
    aligned: tuple[str, ...] = ()
    # Products must run on Hopper's tensor cores, wgmma.
    multiplies: bool = False
    # Bytes a thread may keep in local memory; None: any, where speed does not count.
    max_stack: int | None = field(default=0)


def prefill_case(
    name: str,
    dtype: torch.dtype,
    d: int,
    *,
    num_rows: int = 1 << 19,
    split: bool = False,
    stack: int | None = 0,
) -> Case:
    """`flash_kernel` with the tiles chosen for `num_rows`; partial results are fp32 where keys are split."""
    tiles: Tiles = choose_tiles(num_rows, d, dtype, HOPPER)
    element, block_d = NAMES[dtype], 1 << (d - 1).bit_length()
    described = f"tensordesc<{element}[1, 1, {tiles.keys}, {block_d}]>"
    strides = ("stride_s", "stride_b", "stride_n")
    sizes = ("sq", "sk", "b", "n_kv", "diagonal", "chunk", "num_tiles", "num_splits")
    return Case(
        name=name,
        module="flash",
        kernel="flash_kernel",
        signature={
            **{"q": f"*{element}", "keys": described, "values": described},
            **{"out": "*fp32" if split else f"*{element}", "lse": "*fp32", "scale_log2": "fp32"},
            **dict.fromkeys(strides + sizes, "i32"),
        },
        constants={
            **{"GROUP": 4, "D": d, "BLOCK_D": block_d, "ROWS": tiles.rows, "KEYS": tiles.keys},
            **{"UPCAST": False, "PRECISION": "ieee"},
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        aligned=strides,
        multiplies=dtype != torch.float32,
        max_stack=stack,
    )


def merge_case(name: str, parts: str, out: str, d: int) -> Case:
    """`merge_kernel` of parts of one dtype into another."""
    strides = ("out_part", "out_row", "out_head", "lse_part", "lse_row", "lse_head")
    return Case(
        name=name,
        module="merge",
        kernel="merge_kernel",
        signature={
            **{"outs": f"*{parts}", "lses": "*fp32", "out": f"*{out}", "lse": "*fp32"},
            **dict.fromkeys((*strides, "p", "num_rows", "heads"), "i32"),
        },
        constants={"D": d, "BLOCK_D": d, "BLOCK": 2048 // d},
        num_warps=4,
        aligned=("out_part", "out_row", "out_head"),
    )


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [
    # A thread keeps a few numbers for the end in local memory while it loops; the loops spill nothing.
    prefill_case("prefill bf16 d64", BF16, 64, stack=16),
    prefill_case("prefill bf16 d128", BF16, 128),
    prefill_case("prefill fp16 d128", FP16, 128),
    prefill_case("prefill bf16 d256", BF16, 256, stack=64),
    prefill_case("few queries bf16 d64", BF16, 64, num_rows=64, split=True),
    prefill_case("few queries bf16 d128", BF16, 128, num_rows=64, split=True),
    prefill_case("many keys in parts bf16 d128", BF16, 128, num_rows=256, split=True),
    prefill_case("prefill fp32 d64", FP32, 64, stack=None),
    merge_case("merge bf16 d128", "bf16", "bf16", 128),
    merge_case("merge of splits d128", "fp32", "bf16", 128),
    *csa_cases(Case),
]
