"""CSA's kernels as a layer of an 8B Llama launches them, 32 and 8 heads of 128, to be compiled for Hopper."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch

from megatron_sps2.ops.kernels.csa_pack import TILE_NUMBERS
from megatron_sps2.ops.kernels.csa_score import SEGMENTS
from megatron_sps2.ops.kernels.csa_select import KINDS
from megatron_sps2.ops.kernels.csa_tiles import attend_constants
from tests.kernel_case import Case

# By argument, its type; every other argument that is no constant is an int32.
ELEMENT = "*bf16"
TYPES: dict[str, dict[str, str]] = {
    "score_kernel": {
        **dict.fromkeys(("probes", "k"), ELEMENT),
        **dict.fromkeys(("tops", "sums"), "*fp32"),
        **dict.fromkeys(("first_probe", "probe_row", "task_reader", "key_row", "num_rows"), "*i32"),
        "scale_log2": "fp32",
    },
    "add_up_kernel": {
        **dict.fromkeys(("tops", "sums", "own_tops", "own_sums"), "*fp32"),
        **dict.fromkeys(("here", "own"), "*fp64"),
        **dict.fromkeys(("first_probe", "first_task", "key_row"), "*i32"),
    },
    "mass_kernel": {
        **dict.fromkeys(("probes", "k"), ELEMENT),
        **{"totals": "*fp64", "mass": "*fp32", "scale_log2": "fp32"},
        **dict.fromkeys(("first_probe", "task_reader", "task_row"), "*i32"),
    },
    "choose_kernel": {
        **{"mass": "*fp32", "limits": "*fp64", "bits": "*u8", "counts": "*i32", "kept_mass": "*fp64"},
        **dict.fromkeys(("task_reader", "task_position", "start"), "*i32"),
    },
    "count_kernel": {"bits": "*u8", "counts": "*i32"},
    "list_kernel": {"bits": "*u8", "first": "*i64", "task_row": "*i32", "rows": "*i32"},
    "unite_kernel": {"bits": "*u8", "tasks": "*i64", "first": "*i32", "united": "*u8", "counts": "*i32"},
    "move_kernel": {
        **dict.fromkeys(("k", "v", "packed"), ELEMENT),
        **{"bits": "*u8", "first": "*i64", "parcel_row": "*i64"},
    },
    "attend_kernel": {
        **dict.fromkeys(("q", "k", "v", "out"), ELEMENT),
        **{"rows": "*i32", "first": "*i64", "scale_log2": "fp32"},
        **dict.fromkeys(("num_rows", "query_row", "key_row", "first_task"), "*i32"),
    },
}
OPTIONS = ("num_warps", "num_stages")
_DOT = {"GROUP": 4, "D": 128, "BLOCK_D": 128, "UPCAST": False, "PRECISION": "tf32"}
_PROBES = {**_DOT, "PROBES": 64, "KEYS": 128}


def csa_cases() -> list[Case]:
    return [_case(*each) for each in KERNELS]


def _case(name: str, module: str, kernel: str, chosen: dict[str, Any], multiplies: bool) -> Case:
    options = {"num_warps": 4, "num_stages": 3} | {x: chosen[x] for x in OPTIONS if x in chosen}
    constants = {x: value for x, value in chosen.items() if x not in OPTIONS}
    arguments = getattr(import_module(f"megatron_sps2.ops.kernels.{module}"), kernel).arg_names
    sizes = [x for x in arguments if x not in constants]
    return Case(
        name=name,
        module=module,
        kernel=kernel,
        signature={x: TYPES[kernel].get(x, "i32") for x in sizes},
        constants=constants,
        aligned=tuple(x for x in sizes if x.startswith("stride") or x in ("segment_size", "padded")),
        multiplies=multiplies,
        **options,
    )


def _attend(d: int, dtype: torch.dtype, num_rows: int = 4096) -> dict[str, Any]:
    """Constants, warps and stages as they are chosen for a segment's rows."""
    return {"GROUP": 4, **attend_constants(torch.empty(1, d, dtype=dtype), num_rows), "UPCAST": False}


# Name, module, kernel, constants and where they are not Triton's own OPTIONS, whether it multiplies by wgmma.
KERNELS: list[tuple[str, str, str, dict[str, Any], bool]] = [
    ("csa score", "csa_score", "score_kernel", {**_PROBES, "OWN": False}, True),
    ("csa score own", "csa_score", "score_kernel", {**_PROBES, "OWN": True}, True),
    (
        "csa add up",
        "csa_score",
        "add_up_kernel",
        {"GROUP": 4, "PROBES": 64, "SEGMENTS": SEGMENTS},
        False,
    ),
    ("csa mass", "csa_select", "mass_kernel", {**_PROBES, "NUM_BLOCKS": 1}, True),
    ("csa mass of many probes", "csa_select", "mass_kernel", {**_PROBES, "NUM_BLOCKS": 2}, True),
    *(
        (
            f"csa choose {kind} {size}",
            "csa_select",
            "choose_kernel",
            {"KIND": KINDS[kind], "HAS_MASS": True, "SIZE": size},
            False,
        )
        for kind, size in (("strided", 1024), ("floor", 1024), ("floor", 2048), ("best", 1024))
    ),
    ("csa count", "csa_list", "count_kernel", {"SIZE": 2048}, False),
    ("csa list", "csa_list", "list_kernel", {"SIZE": 2048}, False),
    ("csa unite", "csa_pack", "unite_kernel", {"SIZE": 128}, False),
    *(
        (
            f"csa {'pack' if pack else 'lay out'} d{d}",
            "csa_pack",
            "move_kernel",
            {"PACK": pack, "SIZE": 1024, "KEYS": max(8, TILE_NUMBERS // d), "D": d, "BLOCK_D": d},
            False,
        )
        for pack in (True, False)
        for d in (64, 128)
    ),
    ("csa attend bf16 d128", "csa_attend", "attend_kernel", _attend(128, torch.bfloat16), True),
    ("csa attend bf16 d64", "csa_attend", "attend_kernel", _attend(64, torch.bfloat16), True),
    ("csa attend few rows d128", "csa_attend", "attend_kernel", _attend(128, torch.bfloat16, 64), True),
]
