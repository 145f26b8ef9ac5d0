"""RMSNorm (Zhang & Sennrich 2019, eq. 4), alone or after an addition, rounded or quantized."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .quantize import LIMITS, quantize_rows
from .tuning import Table


@triton.jit(do_not_specialize=["rows"])
def _rms_norm(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    scale_ptr,
    rows,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    LIMIT: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = (row < rows)[:, None] & (column < SIZE)[None, :]
    at = row[:, None] * SIZE + column[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    dtype: tl.constexpr = x.dtype
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + at, mask=inside, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(dtype)
        tl.store(total_ptr + at, x, mask=inside)
    wide = x.to(tl.float32)
    scale = tl.rsqrt(tl.sum(wide * wide, axis=1) / SIZE + eps)
    weight = tl.load(weight_ptr + column, mask=column < SIZE, other=0.0).to(tl.float32)
    normed = (wide * scale[:, None]).to(dtype).to(tl.float32) * weight[None, :]
    if scale_ptr is None:
        tl.store(out_ptr + at, normed.to(dtype), mask=inside)
    else:
        normed = tl.where(inside, normed.to(dtype).to(tl.float32), 0.0)
        codes, scales = quantize_rows(normed, LIMIT, out_ptr.dtype.element_ty)
        tl.store(out_ptr + at, codes, mask=inside)
        tl.store(scale_ptr + row, scales, mask=row < rows)


def rms_norm(x: Tensor, weight: Tensor, eps: float, table: Table) -> Tensor:
    """x `[..., size]`, weight `[size]` -> like x, contiguous. Rounded to x's dtype before the
    weight is multiplied, and after."""
    return _launch(x, None, weight, eps, table)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, table: Table
) -> tuple[Tensor, Tensor]:
    """x, residual `[..., size]` -> (norm of their sum, their sum rounded to x's dtype)."""
    normed, total, _ = _launch(x, residual, weight, eps, table)
    assert total is not None
    return normed, total


def rms_norm_quantized(
    x: Tensor,
    weight: Tensor,
    eps: float,
    table: Table,
    *,
    dtype: torch.dtype,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The norm in `dtype` (int8 or a float8) with a scale a row: codes `[..., size]`, scales fp32
    `[rows]`, and the sum where there is a `residual`."""
    codes, total, scales = _launch(x, residual, weight, eps, table, dtype)
    assert scales is not None
    return codes, scales, total


def _launch(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    table: Table,
    quantized: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    x = x.contiguous()
    residual = None if residual is None else residual.contiguous()
    size = x.shape[-1]
    rows = x.numel() // size
    out = torch.empty_like(x, dtype=quantized or x.dtype)
    total = None if residual is None else torch.empty_like(x)
    scales = None if quantized is None else x.new_empty(rows, dtype=torch.float32)
    values = table.pick("rms_norm", size=size, rows=rows)
    _rms_norm[(triton.cdiv(rows, values["ROWS"]),)](
        x,
        residual,
        weight,
        out,
        total,
        scales,
        rows,
        eps,
        SIZE=size,
        BLOCK=triton.next_power_of_2(size),
        LIMIT=0.0 if quantized is None else LIMITS[quantized],
        **values,
    )
    return out, total, scales
