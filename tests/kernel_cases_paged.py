"""The kernels over pages as production launches them on a Hopper GPU, to be compiled for it without one."""

from __future__ import annotations

import triton.language as tl

from megatron_sps2.ops.kernels.decode_plan import MIN_SPLIT_TOKENS, max_splits, num_stages, tile_tokens
from tests.kernel_case import Case

KV_HEADS, GROUP = 8, 4
SCALES = {"key_scales": "*fp32", "value_scales": "*fp32"}


def splits_case(name: str, d: int, *, float8: bool = False) -> Case:
    """`attend_splits` of 32 query heads in bf16 over 8 KV heads, in bf16 or float8."""
    held, size = ("fp8e4nv", 1) if float8 else ("bf16", 2)
    strides = [f"{part}_stride" for part in ("q_row", "q_head", "key_head", "key_slot", "value_head")]
    strides += ["value_slot_stride", "key_scale_stride", "value_scale_stride"]
    counts = ("num_rows", "num_kv_heads", "bound", "table_stride")
    return Case(
        name=name,
        module="decode_splits",
        kernel="attend_splits",
        signature={
            **{"q": "*bf16", "keys": f"*{held}", "values": f"*{held}", "scale_log2": "fp32"},
            **dict.fromkeys(("tables", "starts", "stops"), "*i32"),
            **dict.fromkeys(("parts", "lses"), "*fp32"),
            **dict.fromkeys((*strides, *counts), "i32"),
            **(SCALES if float8 else {}),
        },
        constants={
            **{"ROWS": 64, "GROUP": GROUP, "PADDED_GROUP": 16, "HEAD_DIM": d, "PADDED_DIM": d},
            **{"BLOCK_SIZE": 16, "TILE": tile_tokens(d, size), "MAX_SPLITS": max_splits(KV_HEADS)},
            **{"MIN_SPLIT": MIN_SPLIT_TOKENS, "QUANTIZED": float8},
            **{"TYPE": tl.float16 if float8 else tl.bfloat16},
            **({} if float8 else dict.fromkeys(SCALES)),
        },
        num_warps=4,
        num_stages=num_stages(d, size),
        aligned=tuple(strides),
    )


def join_case(name: str, num_kv_heads: int) -> Case:
    """`join_splits` of as many splits as rows have at most."""
    return Case(
        name=name,
        module="decode_splits",
        kernel="join_splits",
        signature={
            **{"parts": "*fp32", "lses": "*fp32", "out": "*bf16", "lse": "*fp32"},
            **{"starts": "*i32", "stops": "*i32", "num_heads": "i32", "bound": "i32"},
        },
        constants={
            **{"HEAD_DIM": 128, "DIMS": 32, "MIN_SPLIT": MIN_SPLIT_TOKENS},
            "MAX_SPLITS": max_splits(num_kv_heads),
        },
        num_warps=4,
    )


def append_case(name: str, d: int, *, float8: bool = False, turns: bool = True) -> Case:
    """`append_heads` of bf16 tokens into a cache of bf16 or float8."""
    held, turned = ("fp8e4nv" if float8 else "bf16"), ("cos", "sin")
    strides = [f"{part}_stride" for part in ("q", "q_head", "k", "k_head", "v", "v_head", "cos", "sin")]
    strides += [f"{part}_{of}_stride" for part in ("key", "value") for of in ("head", "slot", "scale")]
    return Case(
        name=name,
        module="append_heads",
        kernel="append_heads",
        signature={
            **dict.fromkeys(("q", "k", "v", "turned_q", "turned_k"), "*bf16"),
            **{"keys": f"*{held}", "values": f"*{held}", "slots": "*i64"},
            **dict.fromkeys((*strides, "num_heads", "num_kv_heads", "num_query_tiles"), "i32"),
            **(dict.fromkeys(turned, "*bf16") if turns else {}),
            **(SCALES if float8 else {}),
        },
        constants={
            **{"ROTARY": d if turns else 0, "HEAD_DIM": d, "PADDED_DIM": d, "HEADS": 2048 // d},
            **{"QUANTIZED": float8, "INTERPRETED": False},
            **({} if turns else dict.fromkeys(turned)),
            **({} if float8 else dict.fromkeys(SCALES)),
        },
        num_warps=4,
        aligned=tuple(strides),
    )


PAGED_CASES = [
    splits_case("decode bf16 d64", 64),
    splits_case("decode bf16 d128", 128),
    splits_case("decode bf16 d256", 256),
    splits_case("decode float8 d64", 64, float8=True),
    splits_case("decode float8 d128", 128, float8=True),
    join_case("decode joined, 1 KV head", 1),
    join_case("decode joined, 8 KV heads", KV_HEADS),
    append_case("append turned bf16 d64", 64),
    append_case("append turned bf16 d128", 128),
    append_case("append turned float8 d128", 128, float8=True),
    append_case("append bf16 d128", 128, turns=False),
]
