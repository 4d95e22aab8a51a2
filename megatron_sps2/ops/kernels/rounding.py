"""Rounding of fp32 inside Triton kernels: by the cast, and by arithmetic where kernels are interpreted."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rounded(x, TYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """fp32 -> the nearest number of TYPE, ties to even, still as fp32; beyond its largest: undefined.

    Triton's interpreter casts to bf16 and float8 by cutting bits off, which does no harm to what is rounded.
    """
    if INTERPRETED and TYPE.is_bf16():
        return _rounded_to(x, 7, -126)
    elif INTERPRETED and TYPE.is_fp8():
        return _rounded_to(x, 3, -6)
    else:
        return x.to(TYPE).to(tl.float32)


@triton.jit
def _rounded_to(x, MANTISSA: tl.constexpr, LEAST_EXPONENT: tl.constexpr):
    """x to MANTISSA bits behind the leading one, fewer below 2^LEAST_EXPONENT.

    1.5 * 2^(23 - MANTISSA) times x's power of two, added, leaves just these bits; subtracted, it is gone.
    """
    bits = x.to(tl.int32, bitcast=True)
    exponent = tl.maximum(bits & 0x7F800000, (LEAST_EXPONENT + 127) << 23)
    large = (exponent + ((23 - MANTISSA) << 23) | 0x400000).to(tl.float32, bitcast=True)
    found = ((x + large) - large).to(tl.int32, bitcast=True)
    # What rounds to zero keeps its sign.
    return (found & 0x7FFFFFFF | bits & -0x80000000).to(tl.float32, bitcast=True)
