"""Eight-bit codes with a scale: one code a value, one scale a row (or a group of a row)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LIMITS = {
    torch.int8: 127.0,
    torch.float8_e4m3fn: 448.0,
    torch.float8_e4m3fnuz: 240.0,
    torch.float8_e5m2: 57344.0,
}
"""The largest magnitude a code stands for."""


@triton.jit
def round_half_even(x):
    """To the nearest integer, of two the even one, as torch rounds: fp32 keeps no fraction beyond
    2^23, so that adding it rounds. For |x| < 2^22."""
    magic: tl.constexpr = 12582912.0  # 1.5 * 2^23
    return (x + magic) - magic


@triton.jit
def encode(x, LIMIT: tl.constexpr, dtype: tl.constexpr):
    """fp32 values already divided by their scale -> codes; what is out of range is the limit."""
    x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
    if dtype == tl.int8:
        x = round_half_even(x)
    return x.to(dtype)


@triton.jit
def quantize_rows(x, LIMIT: tl.constexpr, dtype: tl.constexpr):
    """fp32 `[rows, columns]` -> codes `[rows, columns]` and fp32 scales `[rows]`, max|x| / LIMIT. A
    row that holds NaN or an infinity has a scale of NaN: what was no number does not become one."""
    most = tl.max(tl.abs(x), axis=1)
    # max() passes over NaN; the sum of x * 0 does not.
    poison = tl.sum(x * 0.0, axis=1)
    scale = most / LIMIT
    divisor = tl.where(scale > 0.0, scale, 1.0)
    codes = encode(x / divisor[:, None], LIMIT, dtype)
    return codes, scale + poison
