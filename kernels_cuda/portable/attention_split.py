"""Attention of few queries over many keys: the keys of a sequence are split over programs, and
what they found is merged (flash-decoding, Dao et al. 2023).

How a step's keys are split is decided on the device, from the lengths there: every program gets
about the same number of key tiles, whichever sequences they belong to, and a sequence that is
short beside the others is not split at all. A launch in a graph so stays right for other lengths.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_tile import (
    LOG2E,
    LOWEST,
    Arguments,
    attend_keys,
    empty_state,
    find_sequence,
    load_rows,
    oldest_key,
)
from .tuning import Table

ROWS = 64
"""Most queries x heads of a KV head that a batch of only such sequences is split with; the tile of
a program has a row for each."""

CHUNK = 1024
"""Sequences that are planned together."""


@dataclass(frozen=True, slots=True)
class Splits:
    """How a step's sequences of at most `queries` queries are split. Sequence i has the items
    `starts[i]` to before `starts[i + 1]`, int32 `[seqs + 1]` on the device; `items`: the most that
    all have together. `values`: what the kernel is launched with."""

    starts: Tensor
    items: int
    queries: int
    values: dict[str, Any]


@triton.jit
def _key_tiles(starts_ptr, lens_ptr, i, seqs, most_queries, WINDOW, BLOCK_N: tl.constexpr):
    """(key tiles that sequences i see, are they of those to be split)"""
    start = tl.load(starts_ptr + i, mask=i < seqs, other=0)
    queries = tl.load(starts_ptr + i + 1, mask=i < seqs, other=0) - start
    keys = tl.load(lens_ptr + i, mask=i < seqs, other=0)
    ours = (queries > 0) & (queries <= most_queries)
    tiles = tl.cdiv(keys, BLOCK_N) - oldest_key(keys - queries, WINDOW) // BLOCK_N
    return tl.where(ours, tiles, 0), ours


@triton.jit(do_not_specialize=["seqs", "most_queries"])
def _plan_splits(
    starts_ptr,
    lens_ptr,
    split_starts_ptr,
    seqs,
    most_queries,
    KV_HEADS: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILES: tl.constexpr,
    PROGRAMS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    work = tl.zeros([CHUNK], tl.int64)
    for base in range(0, seqs, CHUNK):
        i = base + tl.arange(0, CHUNK)
        work += _key_tiles(starts_ptr, lens_ptr, i, seqs, most_queries, WINDOW, BLOCK_N)[0]
    share = tl.maximum(tl.cdiv(tl.sum(work, axis=0) * KV_HEADS, PROGRAMS), MIN_TILES).to(tl.int32)
    # Rounded up a sequence, the shares are at most seqs + PROGRAMS / KV_HEADS: `Splits.items`.
    taken = 0
    tl.store(split_starts_ptr, taken)
    for base in range(0, seqs, CHUNK):
        i = base + tl.arange(0, CHUNK)
        tiles, ours = _key_tiles(starts_ptr, lens_ptr, i, seqs, most_queries, WINDOW, BLOCK_N)
        count = tl.where(ours, tl.maximum(tl.cdiv(tiles, share), 1), 0)
        tl.store(split_starts_ptr + 1 + i, taken + tl.cumsum(count, axis=0), mask=i < seqs)
        taken += tl.sum(count, axis=0)


@triton.jit(do_not_specialize=["seqs", "table_stride", "rows"])
def _attend_splits(
    query_ptr,
    key_ptr,
    value_ptr,
    key_scale_ptr,
    value_scale_ptr,
    out_ptr,
    tables_ptr,
    starts_ptr,
    lens_ptr,
    slope_ptr,
    sink_ptr,
    seqs,
    query_stride,
    table_stride,
    score_scale,
    cap,
    out_scale,
    split_starts_ptr,
    partial_ptr,
    state_ptr,
    rows,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_STRIDE: tl.constexpr,
    SCALE_STRIDE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    item = tl.program_id(0)
    kv_head = tl.program_id(1)
    seq = find_sequence(split_starts_ptr, seqs, item, 0, CHUNK)
    first_split = tl.load(split_starts_ptr + seq)
    count = tl.load(split_starts_ptr + seq + 1) - first_split
    split = item - first_split
    if split >= count:
        return
    start = tl.load(starts_ptr + seq)
    queries = tl.load(starts_ptr + seq + 1) - start
    keys = tl.load(lens_ptr + seq)

    row = tl.arange(0, BLOCK_M)
    valid = row < queries * GROUP
    head = kv_head * GROUP + row % GROUP
    position = keys - queries + row // GROUP
    column = tl.arange(0, D)
    token = start + tl.minimum(row // GROUP, queries - 1)  # rows of no query read the last one's
    token_head = token.to(tl.int64) * query_stride + head * HEAD_DIM
    query = load_rows(query_ptr, token_head, HEAD_DIM, D)
    slope = None
    if slope_ptr is not None:
        slope = tl.load(slope_ptr + head) * LOG2E

    oldest = oldest_key(keys - queries, WINDOW)
    first = oldest // BLOCK_N
    tiles = tl.cdiv(keys, BLOCK_N) - first
    begin = (first + tiles * split // count) * BLOCK_N
    end = (first + tiles * (split + 1) // count) * BLOCK_N
    has_sink = row < tl.where(split == 0, queries * GROUP, 0)
    acc, most, total = empty_state(sink_ptr, head, has_sink, BLOCK_M, D)
    acc, most, total = attend_keys(
        acc,
        most,
        total,
        query,
        position,
        slope,
        key_ptr + kv_head * (BLOCK_SIZE * HEAD_DIM),
        value_ptr + kv_head * (BLOCK_SIZE * HEAD_DIM),
        None if key_scale_ptr is None else key_scale_ptr + kv_head * BLOCK_SIZE,
        None if value_scale_ptr is None else value_scale_ptr + kv_head * BLOCK_SIZE,
        tables_ptr + seq.to(tl.int64) * table_stride,
        begin,
        end,
        oldest,
        keys,
        score_scale,
        cap,
        BLOCK_STRIDE,
        SCALE_STRIDE,
        BLOCK_SIZE,
        HEAD_DIM,
        D,
        CAUSAL,
        WINDOW,
        CAPPED,
        BLOCK_N,
        True,
    )
    inside = valid[:, None] & (column < HEAD_DIM)[None, :]
    if count == 1:
        acc *= (out_scale / tl.where(total == 0.0, 1.0, total))[:, None]
        token_head = (start + row // GROUP).to(tl.int64) * (KV_HEADS * GROUP) + head
        at = token_head[:, None] * HEAD_DIM + column[None, :]
        tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)
    else:
        slot = (item.to(tl.int64) * KV_HEADS + kv_head) * rows + row
        tl.store(partial_ptr + slot[:, None] * HEAD_DIM + column[None, :], acc, mask=inside)
        tl.store(state_ptr + slot * 2, most, mask=valid)
        tl.store(state_ptr + slot * 2 + 1, total, mask=valid)


@triton.jit(do_not_specialize=["rows"])
def _merge_splits(
    partial_ptr,
    state_ptr,
    out_ptr,
    starts_ptr,
    split_starts_ptr,
    rows,
    out_scale,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One row of one KV head: a query's head. What one program did alone is there already."""
    seq = tl.program_id(0)
    row = tl.program_id(1)
    kv_head = tl.program_id(2)
    first = tl.load(split_starts_ptr + seq)
    count = tl.load(split_starts_ptr + seq + 1) - first
    start = tl.load(starts_ptr + seq)
    queries = tl.load(starts_ptr + seq + 1) - start
    if (count <= 1) | (row >= queries * GROUP):
        return
    column = tl.arange(0, D)
    acc = tl.zeros([D], tl.float32)
    most = LOWEST + 0.0
    total = 0.0
    for base in range(0, count, SPLITS):
        split = base + tl.arange(0, SPLITS)
        slot = ((first + split).to(tl.int64) * KV_HEADS + kv_head) * rows + row
        split_most = tl.load(state_ptr + slot * 2, mask=split < count, other=LOWEST)
        split_total = tl.load(state_ptr + slot * 2 + 1, mask=split < count, other=0.0)
        inside = (split < count)[:, None] & (column < HEAD_DIM)[None, :]
        at = slot[:, None] * HEAD_DIM + column[None, :]
        partial = tl.load(partial_ptr + at, mask=inside, other=0.0)
        higher = tl.maximum(most, tl.max(split_most, axis=0))
        weights = tl.exp2(split_most - higher)
        fade = tl.exp2(most - higher)
        most = higher
        total = total * fade + tl.sum(weights * split_total, axis=0)
        acc = acc * fade + tl.sum(weights[:, None] * partial, axis=0)
    acc *= out_scale / tl.where(total == 0.0, 1.0, total)
    token = (start + row // GROUP).to(tl.int64)
    head = kv_head * GROUP + row % GROUP
    at = (token * (KV_HEADS * GROUP) + head) * HEAD_DIM + column
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=column < HEAD_DIM)


def plan_splits(
    query_starts: Tensor,
    seq_lens: Tensor,
    max_queries: int,
    max_keys: int,
    kv_heads: int,
    group: int,
    window: int,
    table: Table,
    sizes: dict[str, int],
) -> Splits | None:
    """How to split a step's sequences; None: none is worth it. Of a batch with long prompts the
    sequences that fit the smallest tile are split. `sizes`: what else the table asks for."""
    seqs = seq_lens.shape[0]
    queries = max_queries
    if max_queries > 1 and max_queries * group > ROWS:
        queries = max(1, 16 // group)
    values = table.pick("attend_splits", rows=queries * group, **sizes)
    programs, min_tiles = values.pop("PROGRAMS"), values.pop("MIN_TILES")
    merge = values.pop("SPLITS")
    seen = min(max_keys, window + queries) if window else max_keys
    if seen <= min_tiles * values["BLOCK_N"] or (queries < max_queries and seqs == 1):
        return None
    starts = torch.empty(seqs + 1, dtype=torch.int32, device=seq_lens.device)
    _plan_splits[(1,)](
        query_starts,
        seq_lens,
        starts,
        seqs,
        queries,
        KV_HEADS=kv_heads,
        WINDOW=window,
        BLOCK_N=values["BLOCK_N"],
        MIN_TILES=min_tiles,
        PROGRAMS=programs,
        CHUNK=CHUNK,
    )
    values["BLOCK_M"] = max(16, triton.next_power_of_2(queries * group))
    more = triton.cdiv(seen, min_tiles * values["BLOCK_N"])
    items = seqs + min(programs // kv_heads, seqs * more)
    return Splits(starts, items, queries, values | {"SPLITS": merge})


def attend_splits(arguments: Arguments, splits: Splits, constants: dict[str, Any]) -> None:
    """Launch on `arguments`: of the splits first, then of what merges them."""
    values = dict(splits.values)
    merge = values.pop("SPLITS")
    kv_heads, group, head_dim = (constants[name] for name in ("KV_HEADS", "GROUP", "HEAD_DIM"))
    rows, out = splits.queries * group, arguments.out
    partial = out.new_empty((splits.items, kv_heads, rows, head_dim), dtype=torch.float32)
    state = out.new_empty((splits.items, kv_heads, rows, 2), dtype=torch.float32)
    _attend_splits[(splits.items, kv_heads)](
        *arguments, splits.starts, partial, state, rows, **constants, **values
    )
    _merge_splits[(arguments.seqs, rows, kv_heads)](
        partial,
        state,
        out,
        arguments.query_starts,
        splits.starts,
        rows,
        arguments.out_scale,
        KV_HEADS=kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        D=constants["D"],
        SPLITS=merge,
    )
