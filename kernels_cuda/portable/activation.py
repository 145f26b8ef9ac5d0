"""What stands between the two matrix products of an MLP: gated activations, rounded or quantized;
and the sum of two tensors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .quantize import LIMITS, encode, quantize_rows
from .tuning import Table


@triton.jit
def _activate(x, KIND: tl.constexpr):
    """fp32 -> fp32. The exponential overflows to infinity where the result is 0, no sooner."""
    if KIND == "silu":
        return x / (1.0 + tl.exp(-x))
    elif KIND == "gelu":
        return x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(KIND == "gelu_tanh")
        # (1 + tanh u) / 2 is the logistic function of 2u; there is no tanh that both vendors have.
        return x / (1.0 + tl.exp(x * (-1.5957691216057308 - 0.07135481282632148 * x * x)))


@triton.jit
def _product(gate_up_ptr, row, column, inside, SIZE: tl.constexpr, KIND: tl.constexpr):
    """activation(gate) * up in fp32, both factors and the product rounded to the dtype; 0 outside.
    `row` and `column` broadcast to the tile."""
    at = row * (2 * SIZE) + column
    gate = tl.load(gate_up_ptr + at, mask=inside, other=0.0)
    up = tl.load(gate_up_ptr + at + SIZE, mask=inside, other=0.0)
    dtype: tl.constexpr = gate.dtype
    active = _activate(gate.to(tl.float32), KIND).to(dtype).to(tl.float32)
    return (active * up.to(tl.float32)).to(dtype).to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def _gated(
    gate_up_ptr,
    out_ptr,
    rows,
    SIZE: tl.constexpr,
    KIND: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    row = ((pid // columns).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (pid % columns * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row < rows) & (column < SIZE)
    product = _product(gate_up_ptr, row, column, inside, SIZE, KIND)
    tl.store(out_ptr + row * SIZE + column, product.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gated_quantized(
    gate_up_ptr,
    out_ptr,
    scale_ptr,
    SIZE: tl.constexpr,
    KIND: tl.constexpr,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row a program. One that is longer than BLOCK is computed twice, which costs less than
    keeping it: the second time it comes from the cache."""
    row = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    column = tl.arange(0, BLOCK)[None, :]
    if BLOCK >= SIZE:
        inside = column < SIZE
        product = _product(gate_up_ptr, row, column, inside, SIZE, KIND)
        codes, scales = quantize_rows(product, LIMIT, dtype)
        tl.store(out_ptr + row * SIZE + column, codes, mask=inside)
        tl.store(scale_ptr + row + tl.arange(0, 1), scales)
    else:
        most = tl.zeros([1, BLOCK], tl.float32)
        poison = tl.zeros([1, BLOCK], tl.float32)
        for start in range(0, SIZE, BLOCK):
            inside = start + column < SIZE
            product = _product(gate_up_ptr, row, start + column, inside, SIZE, KIND)
            most = tl.maximum(most, tl.abs(product))
            poison += product * 0.0  # max() passes over NaN
        scale = tl.max(most) / LIMIT
        divisor = tl.where(scale > 0.0, scale, 1.0)
        tl.store(scale_ptr + row, scale + tl.sum(poison))
        for start in range(0, SIZE, BLOCK):
            inside = start + column < SIZE
            product = _product(gate_up_ptr, row, start + column, inside, SIZE, KIND)
            codes = encode(product / divisor, LIMIT, dtype)
            tl.store(out_ptr + row * SIZE + start + column, codes, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _add(
    a_ptr,
    b_ptr,
    out_ptr,
    rows,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns: tl.constexpr = (SIZE + BLOCK - 1) // BLOCK
    pid = tl.program_id(0)
    row = ((pid // columns).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = (pid % columns * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (row < rows) & (column < SIZE)
    at = row * SIZE + column
    total = tl.load(a_ptr + at, mask=inside).to(tl.float32)
    total += tl.load(b_ptr + at, mask=inside).to(tl.float32)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=inside)


def silu_mul(gate_up: Tensor, table: Table) -> Tensor:
    """gate_up `[..., 2 * size]`, gate first -> silu(gate) * up `[..., size]` (Shazeer 2020,
    SwiGLU). The activation is rounded to the dtype before it is multiplied."""
    return _launch(gate_up, "silu", table)


def gelu_mul(gate_up: Tensor, table: Table) -> Tensor:
    """As `silu_mul`, with gelu by the error function."""
    return _launch(gate_up, "gelu", table)


def gelu_tanh_mul(gate_up: Tensor, table: Table) -> Tensor:
    """As `silu_mul`, with gelu by its tanh approximation (Hendrycks & Gimpel 2016, section 2)."""
    return _launch(gate_up, "gelu_tanh", table)


def gated_quantized(
    gate_up: Tensor, activation: str, table: Table, *, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """gate_up `[..., 2 * size]` -> what the function of `activation` ("silu", "gelu" or
    "gelu_tanh") returns, in `dtype` (int8 or a float8) with a scale a row: codes `[..., size]`,
    scales fp32 `[rows]`."""
    gate_up = gate_up.contiguous()
    size = gate_up.shape[-1] // 2
    rows = gate_up.numel() // (2 * size)
    codes = gate_up.new_empty((*gate_up.shape[:-1], size), dtype=dtype)
    scales = gate_up.new_empty(rows, dtype=torch.float32)
    values = _capped(table.pick("gated_quantized", size=size, rows=rows), size)
    if rows:
        _gated_quantized[(rows,)](
            gate_up, codes, scales, SIZE=size, KIND=activation, LIMIT=LIMITS[dtype], **values
        )
    return codes, scales


def add(a: Tensor, b: Tensor, table: Table) -> Tensor:
    """a, b of one shape and dtype -> their sum, contiguous."""
    a, b = a.contiguous(), b.contiguous()
    out = torch.empty_like(a)
    size = a.shape[-1]
    rows = a.numel() // size
    values = _capped(table.pick("add", size=size, rows=rows), size)
    if rows:
        _add[_grid(rows, size, values)](a, b, out, rows, SIZE=size, **values)
    return out


def _launch(gate_up: Tensor, activation: str, table: Table) -> Tensor:
    gate_up = gate_up.contiguous()
    size = gate_up.shape[-1] // 2
    rows = gate_up.numel() // (2 * size)
    out = gate_up.new_empty((*gate_up.shape[:-1], size))
    values = _capped(table.pick("gated", size=size, rows=rows), size)
    if rows:
        _gated[_grid(rows, size, values)](gate_up, out, rows, SIZE=size, KIND=activation, **values)
    return out


def _capped(values: dict[str, int], size: int) -> dict[str, int]:
    """The table's block, or what a row needs of it."""
    return {**values, "BLOCK": min(values["BLOCK"], triton.next_power_of_2(size))}


def _grid(rows: int, size: int, values: dict[str, int]) -> tuple[int]:
    return (triton.cdiv(rows, values["ROWS"]) * triton.cdiv(size, values["BLOCK"]),)
