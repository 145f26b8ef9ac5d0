"""What the attention kernels share: finding a program's sequence, and the flash softmax of a tile
of queries over a range of cached keys.

The softmax is the online one (Milakov & Gimelshein 2018, algorithm 3) in the form of FlashAttention
2 (Dao 2023, section 3.1), in powers of two: scores arrive multiplied by log2(e). A tile's rows are
queries x the heads that share a KV head, so that a key is loaded once for all of them.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1.0e30)
"""Stands for "no score yet": finite, so that its difference to itself is 0 and not NaN."""


class Arguments(NamedTuple):
    """What every attention kernel takes first, in this order. The tensors are those of
    `attention.attend`; `score_scale` and `out_scale` multiply q.k and the result; `cap` is the
    softcap times log2(e)."""

    query: Tensor
    key: Tensor
    value: Tensor
    key_scale: Tensor | None
    value_scale: Tensor | None
    out: Tensor
    block_tables: Tensor
    query_starts: Tensor
    seq_lens: Tensor
    slopes: Tensor | None
    sinks: Tensor | None
    seqs: int
    query_stride: int
    table_stride: int
    score_scale: float
    cap: float
    out_scale: float


@triton.jit
def find_sequence(starts_ptr, seqs, item, BLOCK_Q: tl.constexpr, CHUNK: tl.constexpr):
    """Which sequence has item number `item`. Sequence i's items begin at starts[i]; or, where
    BLOCK_Q, at starts[i] // BLOCK_Q + i: enough tiles of BLOCK_Q queries for any sequence without
    a sum over those before it. An item beyond the last is said to be of the last sequence.

    All starts at once instead of a binary search: one round trip to memory instead of several.
    """
    found = -1
    for base in range(0, seqs, CHUNK):
        i = base + tl.arange(0, CHUNK)
        first = tl.load(starts_ptr + i, mask=i < seqs, other=0)
        if BLOCK_Q:
            first = first // BLOCK_Q + i
        found += tl.sum(((first <= item) & (i < seqs)).to(tl.int32), axis=0)
    return found


@triton.jit
def oldest_key(position, WINDOW: tl.constexpr):
    """The first key that a query at `position` sees; WINDOW 0: there is none."""
    if WINDOW:
        return tl.maximum(position - WINDOW + 1, 0)
    return position * 0


@triton.jit
def load_rows(ptr, at, HEAD_DIM: tl.constexpr, D: tl.constexpr):
    """The vectors that begin at the offsets `at` `[rows]` -> `[rows, D]`, 0 beyond HEAD_DIM."""
    column = tl.arange(0, D)
    if D == HEAD_DIM:
        return tl.load(ptr + (at[:, None] + column[None, :]))
    inside = (column < HEAD_DIM)[None, :]
    return tl.load(ptr + (at[:, None] + column[None, :]), mask=inside, other=0.0)


@triton.jit
def decode(codes, dtype: tl.constexpr):
    """Cached codes as numbers of `dtype`. An int8 has no more bits than bfloat16 keeps: the upper
    half of its fp32 is exact, and takes none of the steps of rounding."""
    if codes.dtype == tl.int8 and dtype == tl.bfloat16:
        upper = codes.to(tl.float32).to(tl.int32, bitcast=True) >> 16
        return upper.to(tl.int16).to(tl.bfloat16, bitcast=True)
    return codes.to(dtype)


@triton.jit
def empty_state(sink_ptr, head, has_sink, BLOCK_M: tl.constexpr, D: tl.constexpr):
    """(weighted sum of values, largest score, sum of weights) before the first key. A sink is a
    score without a value: it counts in the sum of weights alone (gpt-oss, 2025), of the rows that
    `has_sink` names."""
    most = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sink_ptr is not None:
        sink = tl.load(sink_ptr + head, mask=has_sink, other=float("-inf")) * LOG2E
        most = tl.maximum(most, sink)
        total = tl.exp2(sink - most)
    return tl.zeros([BLOCK_M, D], tl.float32), most, total


@triton.jit
def attend_keys(
    acc,
    most,
    total,
    query,
    position,
    slope,
    key_ptr,
    value_ptr,
    key_scale_ptr,
    value_scale_ptr,
    table_ptr,
    begin,
    end,
    oldest,
    limit,
    score_scale,
    cap,
    BLOCK_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """The state after the key tiles from `begin` (a multiple of BLOCK_N) to before `end`.

    query `[rows, D]` in the dtype of the products, position `[rows]`; pointers to the keys, values
    and scales of the KV head and to the sequence's block table. MASKED: not all rows see all keys
    of the range. Scores are lowered by `slope` (times log2 e) a position, where it is not None.

    Keys outside [oldest, limit) may be anything: in their place the nearest key inside is read, and
    weighs 0. That takes no mask, of which the loads of a tile would need many.
    """
    lane = tl.arange(0, BLOCK_N)
    dtype: tl.constexpr = query.dtype
    newest = tl.maximum(limit - 1, 0)
    # A tile's blocks are looked up while the tile before it is computed: an address that waits for
    # memory would take the keys' place in Triton's pipeline.
    read = tl.maximum(tl.minimum(begin + lane, newest), oldest)
    block = tl.load(table_ptr + read // BLOCK_SIZE).to(tl.int64)
    for start in range(begin, end, BLOCK_N):
        within = read % BLOCK_SIZE
        offset = block * BLOCK_STRIDE + within * HEAD_DIM
        beside = block * SCALE_STRIDE + within
        read = tl.minimum(start + BLOCK_N + lane, newest)
        block = tl.load(table_ptr + read // BLOCK_SIZE).to(tl.int64)
        key = load_rows(key_ptr, offset, HEAD_DIM, D)
        value = load_rows(value_ptr, offset, HEAD_DIM, D)
        scores = tl.dot(query, tl.trans(decode(key, dtype)), input_precision="ieee") * score_scale
        if key_scale_ptr is not None:
            scores *= tl.load(key_scale_ptr + beside)[None, :]
        if CAPPED:
            # cap * tanh(x) = cap - 2 cap / (e^2x + 1): right at both ends, where e^2x is 0 or inf.
            scores = cap - 2.0 * cap / (tl.exp2(scores) + 1.0)
        at = start + lane
        distance = position[:, None] - at[None, :]
        if slope is not None:
            scores -= slope[:, None] * tl.abs(distance).to(tl.float32)
        if MASKED:
            seen = distance >= 0 if CAUSAL else (at < limit)[None, :]
            if WINDOW:
                seen = seen & (distance < WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(most, tl.max(scores, axis=1))
        weights = tl.exp2(scores - higher[:, None])
        fade = tl.exp2(most - higher)
        most = higher
        total = total * fade + tl.sum(weights, axis=1)
        if value_scale_ptr is not None:
            # Times 128, which the caller takes out again: weights stay in the range of the values
            # themselves, where a scale of max|v| / 127 would drive them to fp16's smallest.
            scale = tl.load(value_scale_ptr + beside) * 128.0
            weights *= scale[None, :]
        acc = acc * fade[:, None]
        acc = tl.dot(weights.to(dtype), decode(value, dtype), acc, input_precision="ieee")
    return acc, most, total
