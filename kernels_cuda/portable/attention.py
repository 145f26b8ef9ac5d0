"""Attention (Vaswani et al. 2017, eq. 1) over a paged cache, for steps that mix prompts and single
tokens.

The cache of a layer is keys and values `[blocks, kv_heads, block_size, head_dim]`, each head's part
of a block in one piece. Sequences of many queries are computed by tiles of queries, those of few by
parts of their keys (`attention_split`); which is which is read on the device, how much of each
there may be is known to the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_split import Splits, attend_splits, plan_splits
from .attention_tile import (
    LOG2E,
    Arguments,
    attend_keys,
    empty_state,
    find_sequence,
    load_rows,
    oldest_key,
)
from .paged import PagedCache
from .tuning import Table

CHUNK = 256
"""Sequences whose starts a program looks at together."""


class Spec(Protocol):
    """A layer's attention: scores are q.k * `scale`; `sliding_window` counts the keys a query sees,
    itself included (None: all; none where not `causal`); `softcap` 0 is none."""

    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def scale(self) -> float: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def kv_dtype(self) -> torch.dtype: ...
    @property
    def block_size(self) -> int: ...
    @property
    def causal(self) -> bool: ...
    @property
    def sliding_window(self) -> int | None: ...
    @property
    def softcap(self) -> float: ...


class Sequences(NamedTuple):
    """A step's sequences, all on the device: `block_tables` int32 `[seqs, max_blocks]`,
    `query_starts` int32 `[seqs + 1]` and `seq_lens` int32 `[seqs]`, keys with those of this step.
    On the host: no sequence has more than `max_queries` queries or `max_keys` keys."""

    block_tables: Tensor
    query_starts: Tensor
    seq_lens: Tensor
    max_queries: int
    max_keys: int


@dataclass(frozen=True, slots=True)
class Plan:
    """What a step's layers of one `Spec` are launched with: tiles of queries where `tiles`, parts
    of keys where `splits`."""

    sequences: Sequences
    constants: dict[str, Any]
    score_scale: float
    cap: float
    tiles: dict[str, Any] | None
    splits: Splits | None


@triton.jit(do_not_specialize=["seqs", "table_stride", "few"])
def _attend_tiles(
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
    few,
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
    """A tile of queries against all keys it sees. Sequences of at most `few` queries are left out:
    they are split."""
    BLOCK_Q: tl.constexpr = BLOCK_M // GROUP
    # Backwards: a prompt's last tiles see the most keys, and what is long had better begin early.
    item = tl.num_programs(0) - 1 - tl.program_id(0)
    kv_head = tl.program_id(1)
    seq = find_sequence(starts_ptr, seqs, item, BLOCK_Q, CHUNK)
    start = tl.load(starts_ptr + seq)
    queries = tl.load(starts_ptr + seq + 1) - start
    first_query = (item - (start // BLOCK_Q + seq)) * BLOCK_Q
    if (first_query >= queries) | (queries <= few):
        return
    keys = tl.load(lens_ptr + seq)

    row = tl.arange(0, BLOCK_M)
    query_row = first_query + row // GROUP
    valid = (row < BLOCK_Q * GROUP) & (query_row < queries)
    head = kv_head * GROUP + row % GROUP
    position = keys - queries + query_row
    column = tl.arange(0, D)
    token = start + tl.minimum(query_row, queries - 1)  # rows of no query read the last one's
    token_head = token.to(tl.int64) * query_stride + head * HEAD_DIM
    query = load_rows(query_ptr, token_head, HEAD_DIM, D)
    slope = None
    if slope_ptr is not None:
        slope = tl.load(slope_ptr + head) * LOG2E

    # Three ranges: keys that the last queries no longer see, keys that all see, keys that the
    # first do not see yet. Only in the middle one, the longest, nothing has to be asked.
    first_position = keys - queries + first_query
    last_position = keys - queries + tl.minimum(first_query + BLOCK_Q, queries) - 1
    oldest = oldest_key(first_position, WINDOW)
    limit = keys
    common = keys
    if CAUSAL:
        limit = last_position + 1
        common = first_position + 1
    end = tl.cdiv(limit, BLOCK_N) * BLOCK_N
    begin = oldest // BLOCK_N * BLOCK_N
    middle = tl.minimum(tl.cdiv(oldest_key(last_position, WINDOW), BLOCK_N) * BLOCK_N, end)
    last = tl.maximum(common // BLOCK_N * BLOCK_N, middle)
    acc, most, total = empty_state(sink_ptr, head, valid, BLOCK_M, D)
    for part in tl.static_range(0 if WINDOW else 1, 3):
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
            begin if part == 0 else (middle if part == 1 else last),
            middle if part == 0 else (last if part == 1 else end),
            oldest,
            limit,
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
            part != 1,
        )
    acc *= (out_scale / tl.where(total == 0.0, 1.0, total))[:, None]
    token_head = (start + query_row).to(tl.int64) * (KV_HEADS * GROUP) + head
    at = token_head[:, None] * HEAD_DIM + column[None, :]
    inside = valid[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(out_ptr + at, acc.to(out_ptr.dtype.element_ty), mask=inside)


def plan(spec: Spec, sequences: Sequences, table: Table) -> Plan:
    """Decide how a step is computed, once for all layers of `spec`. May launch a small kernel."""
    kv_heads, head_dim = spec.num_kv_heads, spec.head_dim
    group = spec.num_heads // kv_heads
    window = (spec.sliding_window or 0) if spec.causal else 0
    sizes = {
        "head_dim": head_dim,
        "bytes": spec.dtype.itemsize,
        "kv_bytes": spec.kv_dtype.itemsize,
    }
    splits = plan_splits(
        sequences.query_starts,
        sequences.seq_lens,
        sequences.max_queries,
        sequences.max_keys,
        kv_heads,
        group,
        window,
        table,
        sizes,
    )
    tiles = None
    if splits is None or splits.queries < sequences.max_queries:
        tiles = table.pick("attend_tiles", rows=sequences.max_queries * group, **sizes)
        tiles["BLOCK_M"] = max(tiles["BLOCK_M"], triton.next_power_of_2(group))
    scale = spec.scale * LOG2E.value
    if spec.softcap:
        scale *= 2.0 / spec.softcap  # the exponent of tanh, in powers of two
    constants = {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "D": triton.next_power_of_2(head_dim),
        "BLOCK_SIZE": spec.block_size,
        "CAUSAL": spec.causal,
        "WINDOW": window,
        "CAPPED": spec.softcap > 0,
        "CHUNK": CHUNK,
    }
    return Plan(sequences, constants, scale, spec.softcap * LOG2E.value, tiles, splits)


def attend(
    query: Tensor,
    cache: PagedCache,
    plan: Plan,
    *,
    slopes: Tensor | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """query `[tokens, heads, head_dim]`, contiguous but for the stride of tokens -> like it,
    contiguous; the queries of a sequence stand at its last keys. `slopes` fp32 `[heads]`: ALiBi's
    (Press et al. 2022, section 3), lowering scores by slope * distance after the softcap. `sinks`
    fp32 `[heads]`: logits that join the softmax without a value. Tokens of no sequence keep what
    their memory held."""
    sequences = plan.sequences
    # An int8 cache has scales of its vectors; a value's come in times 128, see `attend_keys`.
    out_scale = cache.value_scale if cache.value_scales is None else 1 / 128
    arguments = Arguments(
        query,
        cache.keys,
        cache.values,
        cache.key_scales,
        cache.value_scales,
        query.new_empty(query.shape),
        sequences.block_tables,
        sequences.query_starts,
        sequences.seq_lens,
        slopes,
        sinks,
        sequences.seq_lens.shape[0],
        query.stride(0),
        sequences.block_tables.stride(0),
        plan.score_scale * cache.key_scale,
        plan.cap,
        out_scale,
    )
    scale_stride = 0 if cache.key_scales is None else cache.key_scales.stride(0)
    constants = plan.constants | {
        "BLOCK_STRIDE": cache.keys.stride(0),
        "SCALE_STRIDE": scale_stride,
    }
    splits, tiles = plan.splits, plan.tiles
    if tiles is not None:
        block_q = tiles["BLOCK_M"] // constants["GROUP"]
        grid = (query.shape[0] // block_q + arguments.seqs, constants["KV_HEADS"])
        few = 0 if splits is None else splits.queries
        _attend_tiles[grid](*arguments, few, **constants, **tiles)
    if splits is not None:
        attend_splits(arguments, splits, constants)
    return arguments.out
