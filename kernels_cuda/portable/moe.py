"""Mixture of experts: routing, sorting by expert, the experts' products, and their sum by shares.

A *pair* is a token and one of its `top_k` places: number token * top_k + place. The pairs are
sorted by expert on the device; the host knows only how many tiles they fill at most, and programs
past the last tile end at once. Nothing is added atomically: the same numbers come out each time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemm import BLOCK_SCALE, Int4, launch_values, rescale, step_of, tile_of, tile_product
from .quantize import quantize_tokens
from .tuning import Table


class Coded(NamedTuple):
    """A stacked weight in 8 bits: `codes` `[rows, in]`, int8 or an 8-bit float, and fp32 `scales`
    `[rows]`, or of blocks of 128 by 128 `[rows / 128, ceil(in / 128)]`."""

    codes: Tensor
    scales: Tensor


Experts = Tensor | Coded | Int4
"""The weights of all experts, stacked; `Int4` is packed as one weight of all rows."""


# ---------------------------------------------------------------------------------------------
# Routing
# ---------------------------------------------------------------------------------------------


@triton.jit
def _order_key(score):
    """fp32 -> int32 that sorts as the scores do: NaN (as torch has it) above infinity, the zeros
    equal, and all above -2^31."""
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(score != score, 0x7FC00000, bits)


@triton.jit(do_not_specialize=["tokens"])
def _route(
    score_ptr,
    chosen_ptr,
    share_ptr,
    tokens,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, BLOCK_E)[None, :]
    place = tl.arange(0, BLOCK_P)[None, :]
    there = (row < tokens)[:, None]
    inside = there & (expert < EXPERTS)
    score = tl.load(score_ptr + row[:, None] * EXPERTS + expert, mask=inside, other=0.0)
    score = tl.where(inside, score.to(tl.float32), float("-inf"))
    weight = tl.exp(score - tl.max(score, axis=1)[:, None])
    share = weight / tl.sum(weight, axis=1)[:, None]
    lowest: tl.constexpr = -0x80000000
    key = tl.where(inside, _order_key(score), lowest)
    chosen = tl.zeros((ROWS, BLOCK_P), dtype=tl.int32)
    shares = tl.zeros((ROWS, BLOCK_P), dtype=tl.float32)
    for number in tl.static_range(TOP_K):
        _, best = tl.max(key, axis=1, return_indices=True)  # of equal ones the first
        hit = expert == best[:, None]
        taken = tl.sum(tl.where(hit, share, 0.0), axis=1)
        chosen = tl.where(place == number, best[:, None], chosen)
        shares = tl.where(place == number, taken[:, None], shares)
        key = tl.where(hit, lowest, key)
    if RENORMALIZE:
        shares = shares / tl.sum(shares, axis=1)[:, None]
    at = row[:, None] * TOP_K + place
    inside = there & (place < TOP_K)
    tl.store(chosen_ptr + at, chosen, mask=inside)
    tl.store(share_ptr + at, shares.to(share_ptr.dtype.element_ty), mask=inside)


def route(
    scores: Tensor, top_k: int, renormalize: bool, dtype: torch.dtype, table: Table
) -> tuple[Tensor, Tensor]:
    """scores `[tokens, experts]` -> the experts with the highest, int32 `[tokens, top_k]`, of equal
    ones the first; and their shares in `dtype`: the softmax over all experts in fp32, with
    `renormalize` divided by the sum over the chosen."""
    tokens, experts = scores.shape
    chosen = scores.new_empty(tokens, top_k, dtype=torch.int32)
    shares = scores.new_empty(tokens, top_k, dtype=dtype)
    values = table.pick("moe_route", experts=experts)
    _route[(triton.cdiv(tokens, values["ROWS"]),)](
        scores.contiguous(),
        chosen,
        shares,
        tokens,
        EXPERTS=experts,
        TOP_K=top_k,
        RENORMALIZE=renormalize,
        BLOCK_E=triton.next_power_of_2(experts),
        BLOCK_P=triton.next_power_of_2(top_k),
        **values,
    )
    return chosen, shares


@triton.jit(do_not_specialize=["pairs"])
def _sort(chosen_ptr, order_ptr, count_ptr, pairs, BLOCK: tl.constexpr):
    """A program an expert: it counts the pairs of those before it, then writes its own."""
    expert = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    before = tl.zeros((BLOCK,), dtype=tl.int32)
    mine = tl.zeros((BLOCK,), dtype=tl.int32)
    start = tl.zeros((), dtype=tl.int32)
    while start < pairs:
        inside = start + lane < pairs
        chosen = tl.load(chosen_ptr + start + lane, mask=inside, other=0x7FFFFFFF)
        before += (chosen < expert).to(tl.int32)
        mine += (chosen == expert).to(tl.int32)
        start += BLOCK
    tl.store(count_ptr + expert, tl.sum(mine, axis=0))
    first = tl.sum(before, axis=0)
    start = tl.zeros((), dtype=tl.int32)
    while start < pairs:
        inside = start + lane < pairs
        chosen = tl.load(chosen_ptr + start + lane, mask=inside, other=0x7FFFFFFF)
        hit = (chosen == expert).to(tl.int32)
        tl.store(order_ptr + first + tl.cumsum(hit, axis=0) - 1, start + lane, mask=hit != 0)
        first += tl.sum(hit, axis=0)
        start += BLOCK


def sort_by_expert(chosen: Tensor, experts: int, table: Table) -> tuple[Tensor, Tensor]:
    """chosen int32 `[tokens, top_k]` -> all pairs, those of the first expert first, each expert's
    in their order: int32 `[tokens * top_k]`; and how many each expert has: int32 `[experts]`."""
    order, counts = torch.empty_like(chosen.view(-1)), chosen.new_empty(experts)
    values = table.pick("moe_sort", pairs=chosen.numel())
    _sort[(experts,)](chosen, order, counts, chosen.numel(), **values)
    return order, counts


# ---------------------------------------------------------------------------------------------
# The experts
# ---------------------------------------------------------------------------------------------


@triton.jit
def _segment(count_ptr, tile, EXPERTS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """The expert whose pairs fill `tile`, every expert's filling tiles of their own, and where in
    the sorted pairs the tile begins and the expert ends. Past the last tile: an expert >= EXPERTS.
    """
    number = tl.arange(0, BLOCK_E)
    counts = tl.load(count_ptr + number, mask=number < EXPERTS, other=0)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    expert = tl.sum((tl.cumsum(tiles, axis=0) <= tile).to(tl.int32), axis=0)
    before = number < expert
    passed = tl.sum(tl.where(before, tiles, 0), axis=0)
    first = tl.sum(tl.where(before, counts, 0), axis=0) + (tile - passed) * BLOCK_M
    last = tl.sum(tl.where(number <= expert, counts, 0), axis=0)
    return expert, first, last


@triton.jit(do_not_specialize=["tiles_m", "steps"])
def _experts(
    x_ptr,
    w_ptr,
    x_scale_ptr,
    w_scale_ptr,
    w_zero_ptr,
    order_ptr,
    count_ptr,
    out_ptr,
    tiles_m,
    steps,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    EXPERTS: tl.constexpr,
    SHARE_X: tl.constexpr,
    GATED: tl.constexpr,
    GROUP: tl.constexpr,
    X_STEP: tl.constexpr,
    W_STEP: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Out `[pairs, OUT]`; SHARE_X pairs have one row of x. GATED: of an expert's 2 * OUT rows the
    gate's come first."""
    m, n = tile_of(tl.program_id(0), tiles_m, (OUT + BLOCK_N - 1) // BLOCK_N, GROUP_M)
    expert, first, last = _segment(count_ptr, m, EXPERTS, BLOCK_E, BLOCK_M)
    if expert >= EXPERTS:
        return
    parts: tl.constexpr = 2 if GATED else 1
    at = first + tl.arange(0, BLOCK_M)
    # Past the end the last row is read again: no mask in the loop, and nothing of it is stored.
    pair = tl.load(order_ptr + tl.minimum(at, last - 1))
    x_row = pair // SHARE_X
    x_at = x_row.to(tl.int64) * IN
    w_first = expert * (parts * OUT) + n * BLOCK_N
    w_ahead = tl.minimum(tl.arange(0, BLOCK_N), OUT - 1 - n * BLOCK_N)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    for part in tl.static_range(parts):
        acc = tile_product(
            x_ptr,
            x_at,
            x_row,
            x_scale_ptr,
            w_ptr,
            w_first + part * OUT,
            w_ahead,
            w_scale_ptr,
            w_zero_ptr,
            0,
            steps,
            IN,
            EXPERTS * parts * OUT,
            GROUP,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
        )
        w_row = w_first + part * OUT + w_ahead
        acc = rescale(acc, x_scale_ptr, w_scale_ptr, x_row, w_row, GROUP, X_STEP, W_STEP)
        result = acc.to(dtype)
        if GATED and part == 0:
            gate = result.to(tl.float32)
            opened = (gate / (1.0 + tl.exp(-gate))).to(dtype)
        if GATED and part == 1:
            result = (opened.to(tl.float32) * result.to(tl.float32)).to(dtype)
    column = n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (at < last)[:, None] & (column < OUT)[None, :]
    tl.store(out_ptr + pair.to(tl.int64)[:, None] * OUT + column[None, :], result, mask=inside)


def expert_products(
    x: Tensor,
    weight: Experts,
    order: Tensor,
    counts: Tensor,
    table: Table,
    *,
    gated: bool,
) -> Tensor:
    """x `[rows, in]`, whose rows serve pairs / rows pairs each -> `[pairs, out]` like x: each
    pair's row by its expert's part of `weight` (`gated`: silu of the first half of the outputs
    times the second). By weights in 8 bits x is multiplied in their dtype, quantized with a scale a
    row, or a scale a block where the weights have those. ValueError for blocks that span experts.
    """
    pairs, experts, dtype = order.numel(), counts.numel(), x.dtype
    rows, inputs = x.shape
    kernel, codes, scales, zeros, group = _parts(weight)
    outputs = codes.shape[0] // experts // (2 if gated else 1)
    x_scales = None
    if isinstance(weight, Coded):
        if group and outputs % group:
            raise ValueError(f"{outputs} outputs of an expert are no whole blocks of {group}")
        x, x_scales = quantize_tokens(x, codes.dtype, table, group=group or None)
    sizes = {"rows": triton.cdiv(pairs, experts), "bits": 8 * codes.element_size()}
    values = launch_values(table, kernel, inputs, group, **sizes)
    del values["SPLIT_K"]
    # Every expert's last tile may hold a single pair.
    tiles = min(pairs, (pairs + experts * (values["BLOCK_M"] - 1)) // values["BLOCK_M"])
    out = x.new_empty(pairs, outputs, dtype=dtype)
    _experts[(tiles * triton.cdiv(outputs, values["BLOCK_N"]),)](
        x.contiguous(),
        codes,
        x_scales,
        scales,
        zeros,
        order,
        counts,
        out,
        tiles,
        triton.cdiv(inputs, values["BLOCK_K"]),
        IN=inputs,
        OUT=outputs,
        EXPERTS=experts,
        SHARE_X=pairs // rows,
        GATED=gated,
        GROUP=group,
        X_STEP=step_of(x_scales),
        W_STEP=step_of(scales),
        BLOCK_E=triton.next_power_of_2(experts),
        **values,
    )
    return out


def _parts(weight: Experts) -> tuple[str, Tensor, Tensor | None, Tensor | None, int]:
    """The table's name of what multiplies it, codes, scales, zeros, inputs of a group."""
    if isinstance(weight, Int4):
        return "moe_int4", *weight, weight.group
    if isinstance(weight, Coded):
        if weight.scales.dim() == 2:
            return "moe_blocks", *weight, None, BLOCK_SCALE
        return "moe_scaled", *weight, None, 0
    return "moe_dense", weight, None, None, 0


# ---------------------------------------------------------------------------------------------
# Sum
# ---------------------------------------------------------------------------------------------


@triton.jit
def _combine(
    result_ptr,
    share_ptr,
    out_ptr,
    SIZE: tl.constexpr,
    TOP_K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64) * TOP_K
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for place in tl.static_range(TOP_K):
        result = tl.load(result_ptr + (pair + place) * SIZE + column, mask=inside, other=0.0)
        total += result.to(tl.float32) * tl.load(share_ptr + pair + place).to(tl.float32)
    out = out_ptr + tl.program_id(0).to(tl.int64) * SIZE + column
    tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)


def combine(results: Tensor, shares: Tensor, table: Table) -> Tensor:
    """results `[tokens * top_k, size]`, shares `[tokens, top_k]` -> `[tokens, size]` like results:
    each token's sum by shares, in fp32, in the order of its places."""
    tokens, top_k = shares.shape
    size = results.shape[1]
    out = results.new_empty(tokens, size)
    values = table.pick("moe_combine", size=size)
    _combine[(tokens, triton.cdiv(size, values["BLOCK"]))](
        results, shares, out, SIZE=size, TOP_K=top_k, **values
    )
    return out


def moe(
    x: Tensor,
    scores: Tensor,
    gate_up: Experts,
    down: Experts,
    top_k: int,
    renormalize: bool,
    table: Table,
) -> Tensor:
    """x `[tokens, hidden]`, scores `[tokens, experts]`, gate_up of `[experts * 2 * width, hidden]`
    (of each expert the gate's rows first), down of `[experts * hidden, width]` -> like x. Int4
    weights want x in 16 bits."""
    chosen, shares = route(scores, top_k, renormalize, x.dtype, table)
    order, counts = sort_by_expert(chosen, scores.shape[1], table)
    inner = expert_products(x, gate_up, order, counts, table, gated=True)
    results = expert_products(inner, down, order, counts, table, gated=False)
    return combine(results, shares, table)
