"""Low-rank adapters (Hu et al. 2021, eq. 3) for tokens that use different ones, in any order.

A program takes a tile of tokens and goes through the adapters that occur in it: one, where the
tokens of a sequence stand together, and at most as many as it has tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tuning import Table


@triton.jit(do_not_specialize=["tokens"])
def _shrink(
    x_ptr,
    index_ptr,
    a_ptr,
    out_ptr,
    tokens,
    stride,
    IN: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """A x of one part of the inputs, fp32 `[SPLITS, tokens, RANK]`; 0 for tokens without one."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    part = tl.program_id(1)
    chunk: tl.constexpr = ((IN + SPLITS - 1) // SPLITS + BLOCK - 1) // BLOCK * BLOCK
    rank, column = tl.arange(0, PADDED), tl.arange(0, BLOCK)
    index = tl.load(index_ptr + token, mask=token < tokens, other=-1)
    total = tl.zeros([TOKENS, PADDED], tl.float32)
    adapter = tl.max(index, axis=0)
    while adapter >= 0:
        a = a_ptr + adapter.to(tl.int64) * (RANK * IN) + rank[None, :] * IN
        mine = index == adapter
        product = tl.zeros([TOKENS, PADDED], tl.float32)
        for start in range(part * chunk, min(IN, (part + 1) * chunk), BLOCK):
            at = start + column
            x = tl.load(
                x_ptr + token[:, None] * stride + at[None, :],
                mask=mine[:, None] & (at < IN)[None, :],
                other=0.0,
            )
            weight = tl.load(
                a + at[:, None], mask=(at < IN)[:, None] & (rank < RANK)[None, :], other=0.0
            )
            product = tl.dot(x, weight, product, input_precision="ieee")
        total = tl.where(mine[:, None], product, total)
        adapter = tl.max(tl.where(index < adapter, index, -1), axis=0)
    out = out_ptr + (part * tokens + token)[:, None] * RANK + rank[None, :]
    tl.store(out, total, mask=(token < tokens)[:, None] & (rank < RANK)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def _expand(
    hidden_ptr,
    index_ptr,
    b_ptr,
    scales_ptr,
    y_ptr,
    tokens,
    stride,
    OUT: tl.constexpr,
    RANK: tl.constexpr,
    PADDED: tl.constexpr,
    TOKENS: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    index = tl.load(index_ptr + token, mask=token < tokens, other=-1)
    adapter = tl.max(index, axis=0)
    if adapter < 0:
        return
    dtype: tl.constexpr = b_ptr.dtype.element_ty
    rank = tl.arange(0, PADDED)
    held = (index >= 0)[:, None] & (rank < RANK)[None, :]
    hidden = tl.zeros([TOKENS, PADDED], tl.float32)
    for part in range(SPLITS):
        at = (part * tokens + token)[:, None] * RANK + rank[None, :]
        hidden += tl.load(hidden_ptr + at, mask=held, other=0.0)
    hidden = hidden.to(dtype)
    total = tl.zeros([TOKENS, BLOCK], tl.float32)
    while adapter >= 0:
        b = b_ptr + adapter.to(tl.int64) * (OUT * RANK) + column[None, :] * RANK
        weight = tl.load(
            b + rank[:, None], mask=(rank < RANK)[:, None] & (column < OUT)[None, :], other=0.0
        )
        product = tl.dot(hidden, weight, input_precision="ieee")
        product *= tl.load(scales_ptr + adapter).to(tl.float32)
        total = tl.where((index == adapter)[:, None], product, total)
        adapter = tl.max(tl.where(index < adapter, index, -1), axis=0)
    inside = (index >= 0)[:, None] & (column < OUT)[None, :]
    y = y_ptr + token[:, None] * stride + column[None, :]
    total += tl.load(y, mask=inside, other=0.0).to(tl.float32)
    tl.store(y, total.to(y_ptr.dtype.element_ty), mask=inside)


def add_lora(
    y: Tensor,
    x: Tensor,
    index: Tensor,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    table: Table,
) -> None:
    """y `[tokens, out]` += scale * B (A x), in place. x `[tokens, in]`; index int32 `[tokens]`,
    each token's adapter (-1: none, its y is not touched); a `[adapters, rank, in]`, b `[adapters,
    out, rank]`, both dense; scales fp32 `[adapters]`. A x is summed in fp32 and rounded to b's
    dtype, and the result once."""
    (tokens, inputs), (_, outputs, rank) = x.shape, b.shape
    if not tokens:
        return
    shrink = table.pick("lora_shrink", rank=rank, tokens=tokens)
    expand = table.pick("lora_expand", rank=rank, tokens=tokens)
    splits, padded = shrink["SPLITS"], max(16, triton.next_power_of_2(rank))
    hidden = torch.empty(splits, tokens, rank, dtype=torch.float32, device=x.device)
    _shrink[(triton.cdiv(tokens, shrink["TOKENS"]), splits)](
        x, index, a, hidden, tokens, x.stride(0), IN=inputs, RANK=rank, PADDED=padded, **shrink
    )
    _expand[(triton.cdiv(tokens, expand["TOKENS"]), triton.cdiv(outputs, expand["BLOCK"]))](
        hidden, index, b, scales, y, tokens, y.stride(0),
        OUT=outputs, RANK=rank, PADDED=padded, SPLITS=splits, **expand,
    )  # fmt: skip
