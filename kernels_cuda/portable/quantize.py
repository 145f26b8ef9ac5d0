"""Eight-bit codes with a scale: one code a value, one scale a row (or a group of a row)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tuning import Table

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


@triton.jit(do_not_specialize=["rows"])
def _quantize(
    x_ptr,
    code_ptr,
    scale_ptr,
    rows,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """A row here is a group of GROUP values in a row of SIZE; the last of a row may be shorter."""
    groups: tl.constexpr = (SIZE + GROUP - 1) // GROUP
    dtype: tl.constexpr = code_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = row % groups * GROUP
    at = (row // groups * SIZE + first)[:, None]
    length = tl.where(row < rows, tl.minimum(SIZE - first, GROUP), 0)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    if GROUP <= BLOCK:
        inside = column < length
        x = tl.load(x_ptr + at + column, mask=inside, other=0.0).to(tl.float32)
        codes, scales = quantize_rows(x, LIMIT, dtype)
        tl.store(code_ptr + at + column, codes, mask=inside)
    else:
        # Too long for the registers: once for the scale and, from the cache, again for the codes.
        most = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        poison = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
        for start in range(0, GROUP, BLOCK):
            x = tl.load(x_ptr + at + start + column, mask=start + column < length, other=0.0)
            most = tl.maximum(most, tl.abs(x.to(tl.float32)))
            poison += x.to(tl.float32) * 0.0
        scales = tl.max(most, axis=1) / LIMIT
        divisor = tl.where(scales > 0.0, scales, 1.0)[:, None]
        scales += tl.sum(poison, axis=1)
        for start in range(0, GROUP, BLOCK):
            inside = start + column < length
            x = tl.load(x_ptr + at + start + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(code_ptr + at + start + column, encode(x / divisor, LIMIT, dtype), mask=inside)
    tl.store(scale_ptr + row, scales, mask=row < rows)


def quantize_tokens(
    x: Tensor, dtype: torch.dtype, table: Table, group: int | None = None
) -> tuple[Tensor, Tensor]:
    """x `[tokens, size]` -> codes like x in `dtype` (int8 or a float8) and fp32 scales `[tokens]`,
    or with a `group` of values that share one `[tokens, ceil(size / group)]`."""
    x = x.contiguous()
    tokens, size = x.shape
    groups = triton.cdiv(size, group) if group else 1
    codes = torch.empty_like(x, dtype=dtype)
    scales = x.new_empty((tokens, groups) if group else tokens, dtype=torch.float32)
    rows = tokens * groups
    values = table.pick("quantize_tokens", size=min(group or size, size))
    _quantize[(triton.cdiv(rows, values["ROWS"]),)](
        x, codes, scales, rows, SIZE=size, GROUP=group or size, LIMIT=LIMITS[dtype], **values
    )
    return codes, scales
