"""x @ W^T (+ bias) for weights in 4 and 8 bits, and for dense ones by the same skeleton.

`x` is `[tokens, in]`, a weight `[out, in]`. A program makes a tile of BLOCK_M tokens by BLOCK_N
outputs; with SPLIT_K of the table over 1, of a part of the inputs, and a second kernel sums the
parts in their order: so the same numbers come out each time. `tile_product` is the inner loop of
every format; `moe` uses it too.

Int4 weights are packed by `pack_int4`; a tile holds the products of one group of inputs at a time,
which are scaled in fp32, so that the codes enter the dot as the small integers they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tuning import Table

BLOCK_SCALE = 128
"""Inputs, and outputs, that share a scale in block-scaled FP8 (DeepSeek-V3, section 3.3.2)."""


class Int4(NamedTuple):
    """An int4 weight as the kernels read it: `codes` uint8 `[out, in / 2]`; `scales` fp32 and
    `zeros` uint8 `[in / group, out]`. In a group's bytes the low halves hold the codes of its first
    half of inputs and the high halves those of its second: so that each half is a tile by itself
    and no code has to change its place."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor

    @property
    def group(self) -> int:
        return 2 * self.codes.shape[1] // self.scales.shape[0]


def pack_int4(codes: Tensor, scales: Tensor, zeros: Tensor) -> Int4:
    """Codes uint8 `[out, in]` in 0..15, scales and zeros `[out, in / group]` (a value is
    (code - zero) * scale) -> the same weight packed. ValueError for groups that the kernels do not
    know: 32, 64 and 128 inputs."""
    out, size = codes.shape
    groups = scales.shape[1]
    if size % groups or size // groups not in (32, 64, 128):
        raise ValueError(f"int4: {groups} groups of {size} inputs; a group has 32, 64 or 128")
    low, high = codes.view(out, groups, 2, -1).unbind(2)
    return Int4(
        (low | high << 4).reshape(out, size // 2),
        scales.float().t().contiguous(),
        zeros.to(torch.uint8).t().contiguous(),
    )


# ---------------------------------------------------------------------------------------------
# Inner loops
# ---------------------------------------------------------------------------------------------


@triton.jit
def _load(at, inside, EVEN: tl.constexpr):
    return tl.load(at) if EVEN else tl.load(at, mask=inside, other=0.0)


@triton.jit
def _dense_product(
    x_ptr,
    x_at,
    w_ptr,
    w_at,
    first,
    steps,
    IN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Unscaled: int32 of int8, fp32 of all else."""
    whole: tl.constexpr = IN % BLOCK_K == 0
    integer: tl.constexpr = w_ptr.dtype.element_ty == tl.int8
    wide: tl.constexpr = tl.int32 if integer else tl.float32
    # Hopper sums products of 8-bit floats in fewer bits than fp32 has: into fp32 at every step.
    imprecise: tl.constexpr = BLOCK_K if w_ptr.dtype.element_ty.is_fp8() else None
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=wide)
    for number in range(steps):
        step = first + number
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        x = _load(x_ptr + (x_at[:, None] + k[None, :]), (k < IN)[None, :], whole)
        w = _load(w_ptr + (w_at[None, :] + k[:, None]), (k < IN)[:, None], whole)
        acc = tl.dot(
            x, w, acc, input_precision="ieee", max_num_imprecise_acc=imprecise, out_dtype=wide
        )
    return acc


@triton.jit
def _block_product(
    x_ptr,
    x_at,
    w_ptr,
    w_at,
    x_scale_at,
    w_scale_at,
    first,
    steps,
    IN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Scaled by the blocks' scales: x_scale_at `[BLOCK_M]` points to a row's first, w_scale_at to
    the first of the one block of outputs that the tile is of."""
    tl.static_assert(GROUP % BLOCK_K == 0 and GROUP % BLOCK_N == 0)
    whole: tl.constexpr = IN % BLOCK_K == 0
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for number in range(steps):
        step = first + number
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        x = _load(x_ptr + (x_at[:, None] + k[None, :]), (k < IN)[None, :], whole)
        w = _load(w_ptr + (w_at[None, :] + k[:, None]), (k < IN)[:, None], whole)
        group = step * BLOCK_K // GROUP
        scale = tl.load(x_scale_at + group) * tl.load(w_scale_at + group)
        acc += tl.dot(x, w, max_num_imprecise_acc=BLOCK_K, out_dtype=tl.float32) * scale[:, None]
    return acc


@triton.jit
def _less_zero(codes, zero, dtype: tl.constexpr):
    """Codes 0..15 and zeros `[BLOCK_N]` -> code - zero in `dtype`, exactly. A code is put below the
    digits of a power of two whose unit is the last digit: what stands there is the power + code."""
    power: tl.constexpr = 1024 if dtype == tl.float16 else 128
    bits: tl.constexpr = 0x6400 if dtype == tl.float16 else 0x4300
    tl.static_assert(dtype == tl.float16 or dtype == tl.bfloat16)
    above = (codes.to(tl.int16) | bits).to(dtype, bitcast=True)
    return above - (zero.to(tl.float32) + power).to(dtype)[:, None]


@triton.jit
def _int4_product(
    x_ptr,
    x_at,
    w_ptr,
    w_at,
    scale_ptr,
    zero_ptr,
    ahead,
    first,
    steps,
    OUTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Scaled by the groups' scales; `ahead` `[BLOCK_N]` tells a row's scale from the tile's first,
    and a group has OUTS of them. The
    product is made transposed, with the weight first: the few tokens of a decode step are then
    the side of a matrix instruction that may be narrow, and codes can go to it by registers."""
    tl.static_assert(GROUP % BLOCK_K == 0)
    half: tl.constexpr = BLOCK_K // 2
    acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    for number in range(steps):
        step = first + number
        byte = step * half + tl.arange(0, half)
        codes = tl.load(w_ptr + (w_at[:, None] + byte[None, :]))
        group = step * BLOCK_K // GROUP
        # A group's byte i: inputs i and GROUP / 2 + i of the group.
        k = byte + group * (GROUP // 2)
        low = tl.load(x_ptr + (x_at[None, :] + k[:, None]))
        high = tl.load(x_ptr + (x_at[None, :] + (k + GROUP // 2)[:, None]))
        scale = tl.load(scale_ptr + group * OUTS + ahead)
        zero = tl.load(zero_ptr + group * OUTS + ahead)
        part = tl.dot(_less_zero(codes & 15, zero, low.dtype), low, out_dtype=tl.float32)
        part = tl.dot(_less_zero(codes >> 4, zero, low.dtype), high, part, out_dtype=tl.float32)
        acc += part * scale[:, None]
    return tl.trans(acc)


@triton.jit
def tile_product(
    x_ptr,
    x_at,
    x_row,
    x_scale_ptr,
    w_ptr,
    w_first,
    w_ahead,
    w_scale_ptr,
    w_zero_ptr,
    first,
    steps,
    IN: tl.constexpr,
    OUTS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """A tile `[BLOCK_M, BLOCK_N]` of `steps` times BLOCK_K inputs, from the step `first` on.

    Rows of x are `x_at` elements past `x_ptr`; `x_row` are those of their scales. Rows of the
    weight, which has OUTS, are w_first + w_ahead. Scaled already where scales are of groups (GROUP
    is not 0), otherwise for `rescale` to scale.
    """
    groups: tl.constexpr = (IN + GROUP - 1) // GROUP if GROUP > 0 else 0
    row = tl.cast(w_first, tl.int64)
    if w_zero_ptr is not None:
        acc = _int4_product(
            x_ptr,
            x_at,
            w_ptr + row * (IN // 2),
            w_ahead * (IN // 2),
            w_scale_ptr + row,
            w_zero_ptr + row,
            w_ahead,
            first,
            steps,
            OUTS,
            GROUP,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
    elif GROUP > 0:
        acc = _block_product(
            x_ptr,
            x_at,
            w_ptr + row * IN,
            w_ahead * IN,
            x_scale_ptr + x_row.to(tl.int64) * groups,
            w_scale_ptr + row // GROUP * groups,
            first,
            steps,
            IN,
            GROUP,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
    else:
        acc = _dense_product(
            x_ptr,
            x_at,
            w_ptr + row * IN,
            w_ahead * IN,
            first,
            steps,
            IN,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
    return acc


@triton.jit
def rescale(
    acc,
    x_scale_ptr,
    w_scale_ptr,
    x_row,
    w_row,
    GROUP: tl.constexpr,
    X_STEP: tl.constexpr,
    W_STEP: tl.constexpr,
):
    """Sums of codes' products `[rows, columns]` times the scales of their rows and columns, fp32; a
    step of 0: one scale for all. What is scaled already, or has no scales, stays."""
    acc = acc.to(tl.float32)
    if GROUP == 0 and w_scale_ptr is not None:
        x_scale = tl.load(x_scale_ptr + x_row * X_STEP)
        w_scale = tl.load(w_scale_ptr + w_row * W_STEP)
        acc = acc * x_scale[:, None] * w_scale[None, :]
    return acc


@triton.jit
def tile_of(program, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """The tile that a program makes. GROUP_M tiles of rows are gone through together for each tile
    of columns: programs that run at a time then share what they read, in the second-level cache."""
    band = GROUP_M * tiles_n
    first = program // band * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    inside = program % band
    return first + inside % height, inside // height


# ---------------------------------------------------------------------------------------------
# Kernels
# ---------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows", "steps"])
def _gemm(
    x_ptr,
    w_ptr,
    x_scale_ptr,
    w_scale_ptr,
    w_zero_ptr,
    bias_ptr,
    out_ptr,
    rows,
    steps,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    GROUP: tl.constexpr,
    X_STEP: tl.constexpr,
    W_STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr,
):
    """`out_ptr`: `[rows, OUT]`, or with SPLIT_K sums to be made `[SPLIT_K, rows, OUT]`. `steps` of
    a sum are told at the launch: a loop of a known length would be unrolled whole, and spill."""
    tiles_n: tl.constexpr = (OUT + BLOCK_N - 1) // BLOCK_N
    m, n = tile_of(tl.program_id(0), tl.cdiv(rows, BLOCK_M), tiles_n, GROUP_M)
    # Past the end the last row is read again: no mask in the loop, and nothing of it is stored.
    ahead = tl.minimum(tl.arange(0, BLOCK_M), rows - 1 - m * BLOCK_M)
    w_ahead = tl.minimum(tl.arange(0, BLOCK_N), OUT - 1 - n * BLOCK_N)
    x_row, w_row = m * BLOCK_M + ahead, n * BLOCK_N + w_ahead
    split = tl.program_id(1)
    acc = tile_product(
        x_ptr + m.to(tl.int64) * BLOCK_M * IN,
        ahead * IN,
        x_row,
        x_scale_ptr,
        w_ptr,
        n * BLOCK_N,
        w_ahead,
        w_scale_ptr,
        w_zero_ptr,
        split * steps,
        steps,
        IN,
        OUT,
        GROUP,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    row = m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = n * BLOCK_N + tl.arange(0, BLOCK_N)
    at = row[:, None] * OUT + column[None, :]
    inside = (row < rows)[:, None] & (column < OUT)[None, :]
    if SPLIT_K == 1:
        acc = rescale(acc, x_scale_ptr, w_scale_ptr, x_row, w_row, GROUP, X_STEP, W_STEP)
        if bias_ptr is not None:
            acc += tl.load(bias_ptr + w_row).to(tl.float32)[None, :]
    else:
        at += split.to(tl.int64) * rows * OUT
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _sum_splits(
    part_ptr,
    x_scale_ptr,
    w_scale_ptr,
    bias_ptr,
    out_ptr,
    rows,
    OUT: tl.constexpr,
    GROUP: tl.constexpr,
    X_STEP: tl.constexpr,
    W_STEP: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (column < OUT)[None, :]
    at = row[:, None] * OUT + column[None, :]
    acc = tl.load(part_ptr + at, mask=inside, other=0)
    for split in tl.static_range(1, SPLIT_K):
        step = tl.cast(rows, tl.int64) * (split * OUT)
        acc += tl.load(part_ptr + step + at, mask=inside, other=0)
    w_row = tl.minimum(column, OUT - 1)
    acc = rescale(acc, x_scale_ptr, w_scale_ptr, row, w_row, GROUP, X_STEP, W_STEP)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + w_row).to(tl.float32)[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------------------------------------
# Launches
# ---------------------------------------------------------------------------------------------


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None, table: Table) -> Tensor:
    """x `[tokens, in]`, dense weight `[out, in]` of the same dtype, bias `[out]` -> `[tokens, out]`
    like x."""
    return _launch("gemm_dense", x, weight, bias, table, dtype=x.dtype, bits=8 * x.element_size())


def matmul_scaled(
    x: Tensor,
    weight: Tensor,
    x_scales: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    table: Table,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """Codes x `[tokens, in]` and weight `[out, in]`, both int8 or both 8-bit floats, with fp32
    scales: x's `[tokens]`, the weight's `[out]`, or `[]` for one of all -> `[tokens, out]` in
    `dtype`. Int8 is summed in int32, which holds the products of 133,000 inputs."""
    return _launch(
        "gemm_scaled",
        x,
        weight,
        bias,
        table,
        dtype=dtype,
        x_scales=x_scales,
        weight_scales=weight_scales,
    )


def matmul_blocks(
    x: Tensor,
    weight: Tensor,
    x_scales: Tensor,
    weight_scales: Tensor,
    bias: Tensor | None,
    table: Table,
    *,
    dtype: torch.dtype,
) -> Tensor:
    """8-bit floats x `[tokens, in]` and weight `[out, in]` with fp32 scales of blocks: x's
    `[tokens, ceil(in / 128)]`, the weight's `[ceil(out / 128), ceil(in / 128)]` -> `[tokens, out]`
    in `dtype`. Products of a block are summed, then scaled (DeepSeek-V3, section 3.3.2)."""
    return _launch(
        "gemm_blocks",
        x,
        weight,
        bias,
        table,
        dtype=dtype,
        x_scales=x_scales,
        weight_scales=weight_scales,
        group=BLOCK_SCALE,
    )


def matmul_int4(x: Tensor, weight: Int4, bias: Tensor | None, table: Table) -> Tensor:
    """x `[tokens, in]` fp16 or bf16, int4 weight of `[out, in]` -> `[tokens, out]` like x."""
    return _launch(
        "gemm_int4",
        x,
        weight.codes,
        bias,
        table,
        dtype=x.dtype,
        weight_scales=weight.scales,
        weight_zeros=weight.zeros,
        group=weight.group,
    )


def _launch(
    kernel: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    table: Table,
    *,
    dtype: torch.dtype,
    x_scales: Tensor | None = None,
    weight_scales: Tensor | None = None,
    weight_zeros: Tensor | None = None,
    group: int = 0,
    **sizes: int,
) -> Tensor:
    rows, inputs = x.shape
    outputs = weight.shape[0]
    values = launch_values(table, kernel, inputs, group, rows=rows, columns=outputs, **sizes)
    split = values["SPLIT_K"]
    steps = triton.cdiv(inputs, values["BLOCK_K"]) // split
    scale_steps = {"X_STEP": step_of(x_scales), "W_STEP": step_of(weight_scales)}
    out = x.new_empty(rows, outputs, dtype=dtype)
    parts = out
    if split > 1:
        parts = x.new_empty(
            split, rows, outputs, dtype=torch.int32 if x.dtype == torch.int8 else torch.float32
        )
    tiles = triton.cdiv(rows, values["BLOCK_M"]) * triton.cdiv(outputs, values["BLOCK_N"])
    _gemm[(tiles, split)](
        x.contiguous(),
        weight,
        x_scales,
        weight_scales,
        weight_zeros,
        bias,
        parts,
        rows,
        steps,
        IN=inputs,
        OUT=outputs,
        GROUP=group,
        **scale_steps,
        **values,
    )
    if split > 1:
        values = table.pick("gemm_reduce")
        _sum_splits[(rows, triton.cdiv(outputs, values["BLOCK"]))](
            parts,
            x_scales,
            weight_scales,
            bias,
            out,
            rows,
            OUT=outputs,
            GROUP=group,
            SPLIT_K=split,
            **scale_steps,
            **values,
        )
    return out


def launch_values(
    table: Table, kernel: str, inputs: int, group: int, **sizes: int
) -> dict[str, Any]:
    """The table's values, where a step of the loop is in one group of inputs and every part of a
    split sum has as many steps."""
    values = table.pick(kernel, **sizes)
    if group:
        values["BLOCK_K"] = min(values["BLOCK_K"], group)
    steps = triton.cdiv(inputs, values["BLOCK_K"])
    values["SPLIT_K"] = next(n for n in range(values["SPLIT_K"], 0, -1) if steps % n == 0)
    return values


def step_of(scales: Tensor | None) -> int:
    """From one row's scale to the next."""
    return 0 if scales is None or scales.dim() == 0 else 1
