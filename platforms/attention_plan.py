"""How the padded torch attention cuts one step into few groups of similar shape.

A sequence becomes one or more pieces: a run of its queries with the keys that they see. Pieces of
similar size are padded to one rectangle, so that a step costs a handful of calls a layer whatever
the number of requests, and little of it is computed for nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .interface import AttentionBatch, AttentionSpec
from .transfers import to_accelerator

SCORES = 1 << 22  # most scores of one group, all heads: in fp32 they should stay in a cache
PIECE_QUERIES = 64  # fewest queries a piece is cut to: each gathers its keys again
WINDOW_QUERIES = 256  # most queries a piece under a window: their keys are few, so should they be
FOLDED_ROWS = 64  # most queries a KV head that plain products serve best
GROUP_BYTES = 8 << 20  # most keys and values of one group, in fp32: they should stay in a cache
CALL_TOKENS = 64  # what one more group costs, in gathered tokens
WASTE = 0.15  # padding worth one call less, as a share of the work


class Piece(NamedTuple):
    """Queries [start, stop) of the packed axis, the first at `position`, with keys [low, high)."""

    sequence: int
    start: int
    stop: int
    position: int
    low: int
    high: int

    @property
    def queries(self) -> int:
        return self.stop - self.start

    @property
    def keys(self) -> int:
        return self.high - self.low

    def is_triangle(self, spec: AttentionSpec) -> bool:
        """Each query sees exactly the keys up to its own, all alike: no prefix, window or ALiBi."""
        window = spec.sliding_window
        square = spec.causal and self.queries == self.keys and not spec.alibi_slopes
        return square and (window is None or window >= self.keys)


@dataclass(frozen=True, slots=True)
class Group:
    """Pieces padded to `batch` x `queries` x `keys`.

    `slots` int64 `[batch * kv_heads * keys]`: rows of the cache seen as `[slots * kv_heads,
    head_dim]`; padding repeats the piece's own last key, so that nothing foreign or stale is ever
    read. `rows` int64 `[batch * queries]`: packed indices of the queries, padding repeats the last
    (None: they are rows [start, start + batch * queries)). `valid`: the entries of `rows` that are
    no padding (None: all). `mask` `[batch, 1, queries, keys]`, 0 or -inf, is added to the scores
    (None: each query sees all, or where `causal` the lower triangle). `alibi`: slopes `[heads, 1,
    1]` and distances `[batch, 1, queries, keys]`, whose product is taken off the scores (None:
    nothing is). `folded`: the heads that share a KV head are computed as its queries, by plain
    products.
    """

    batch: int
    queries: int
    keys: int
    start: int
    slots: Tensor
    rows: Tensor | None
    valid: Tensor | None
    mask: Tensor | None
    alibi: tuple[Tensor, Tensor] | None
    causal: bool
    folded: bool


class Plan(NamedTuple):
    """The groups of one step, and the memory their keys and values are gathered into, made once
    a step because fresh pages cost more than filling them."""

    groups: list[Group]
    scratch: tuple[Tensor, Tensor]


def make_plan(spec: AttentionSpec, batch: AttentionBatch) -> Plan:
    groups = [build(spec, batch, pieces) for pieces in bundle(spec, cut(spec, batch))]
    shape = (max((len(group.slots) for group in groups), default=0), spec.head_dim)
    device = batch.block_tables.device
    key = torch.empty(shape, dtype=spec.kv_dtype, device=device)
    return Plan(groups, (key, torch.empty_like(key)))


def cut(spec: AttentionSpec, batch: AttentionBatch) -> list[Piece]:
    """The pieces of a step, in the order of the packed axis."""
    pieces: list[Piece] = []
    for sequence, length in enumerate(batch.seq_lens):
        start, stop = batch.query_starts[sequence], batch.query_starts[sequence + 1]
        whole = Piece(sequence, start, stop, length - (stop - start), 0, length)
        step = max(1, whole.queries)
        if folds(spec, step) or not whole.is_triangle(spec):
            step = min(step, max(PIECE_QUERIES, SCORES // (spec.num_heads * length)))
        if spec.causal and spec.sliding_window is not None:
            step = min(step, WINDOW_QUERIES)
        pieces += (_piece(spec, whole, at, min(at + step, stop)) for at in range(start, stop, step))
    return pieces


def _piece(spec: AttentionSpec, whole: Piece, start: int, stop: int) -> Piece:
    first = whole.position + start - whole.start
    if not spec.causal:
        return whole._replace(start=start, stop=stop, position=first)
    window = spec.sliding_window
    low = 0 if window is None else max(0, first - window + 1)
    return Piece(whole.sequence, start, stop, first, low, first + stop - start)


def bundle(spec: AttentionSpec, pieces: list[Piece]) -> list[list[Piece]]:
    """Pieces to pad together. One bundle in the given order if that wastes little; otherwise by
    falling size, greedily."""
    limit = GROUP_BYTES // (2 * spec.num_kv_heads * spec.head_dim * torch.float32.itemsize)
    straight = list(_greedy(pieces, spec, limit))
    if len(straight) <= 1:
        return straight
    ordered = sorted(pieces, key=lambda p: (p.queries, p.keys, -p.start), reverse=True)
    return list(_greedy(ordered, spec, limit))


def _greedy(pieces: Iterable[Piece], spec: AttentionSpec, limit: int) -> Iterable[list[Piece]]:
    """Consecutive pieces share a bundle while its rectangle is mostly used and it fits."""
    bundled: list[Piece] = []
    queries = keys = useful = 0
    for piece in pieces:
        wide, tall = max(queries, piece.queries), max(keys, piece.keys)
        work = useful + piece.queries * piece.keys
        count = len(bundled) + 1
        wasted = count * wide * tall - work
        fits = count * tall <= limit and count * wide * tall * spec.num_heads <= SCORES
        if bundled and not (fits and wasted <= CALL_TOKENS + WASTE * work):
            yield bundled
            bundled, wide, tall, work = [], piece.queries, piece.keys, piece.queries * piece.keys
        bundled.append(piece)
        queries, keys, useful = wide, tall, work
    if bundled:
        yield bundled


def build(spec: AttentionSpec, batch: AttentionBatch, pieces: list[Piece]) -> Group:
    """The index tensors of one group, on the device of the block tables. What depends on the host
    alone is decided there, so that nothing waits for the device."""
    device = batch.block_tables.device
    queries, keys = max(p.queries for p in pieces), max(p.keys for p in pieces)
    table = to_accelerator(torch.tensor(pieces, dtype=torch.int64), device)
    sequence, start, stop, position, low, high = table.unsqueeze(2).unbind(1)  # each [batch, 1]
    key_at = low + torch.arange(keys, device=device)  # [batch, keys]
    row = start + torch.arange(queries, device=device)  # [batch, queries]
    slots = _slots(spec, batch.block_tables, sequence, torch.minimum(key_at, high - 1))
    folded = folds(spec, queries)
    # Padding after a triangle lies outside of it: no mask even where the pieces differ.
    causal = not folded and all(p.is_triangle(spec) for p in pieces)
    mask = alibi = None
    if not causal:
        query_at = torch.minimum(row, stop - 1) - start + position
        alibi = _alibi(spec, query_at, key_at)
        if not _sees_all(spec, pieces, queries, keys):
            mask = _mask(spec, query_at, key_at, high)
    even = all(p.queries == queries for p in pieces)
    in_order = all(a.stop == b.start for a, b in pairwise(pieces))
    return Group(
        batch=len(pieces),
        queries=queries,
        keys=keys,
        start=pieces[0].start,
        slots=slots,
        rows=None if even and in_order else torch.minimum(row, stop - 1).view(-1),
        valid=None if even else to_accelerator(_valid(pieces, queries), device),
        mask=mask,
        alibi=alibi,
        causal=causal,
        folded=folded,
    )


def _valid(pieces: list[Piece], queries: int) -> Tensor:
    """Which of `batch` x `queries` rows are no padding, on the host."""
    lengths = np.array([p.queries for p in pieces])
    return torch.from_numpy(np.flatnonzero(np.arange(queries) < lengths[:, None]))


def _sees_all(spec: AttentionSpec, pieces: list[Piece], queries: int, keys: int) -> bool:
    """Does every query see all `keys` keys?"""
    if any(p.keys < keys for p in pieces):
        return False
    window = spec.sliding_window
    return not spec.causal or (queries == 1 and (window is None or keys <= window))


def _slots(spec: AttentionSpec, tables: Tensor, sequence: Tensor, at: Tensor) -> Tensor:
    """Cache rows of the positions `at` `[batch, keys]`: int64 `[batch * kv_heads * keys]`."""
    block = tables[sequence, at.div(spec.block_size, rounding_mode="floor")].long()
    slot = block * spec.block_size + at % spec.block_size
    heads = torch.arange(spec.num_kv_heads, device=at.device)
    return (slot.unsqueeze(1) * spec.num_kv_heads + heads.unsqueeze(1)).view(-1)


def folds(spec: AttentionSpec, queries: int) -> bool:
    """Does a group with so many queries go by two plain products, not by the fused call? Those
    are quicker for few queries, and the fused call cannot do a softcap."""
    few = queries * (spec.num_heads // spec.num_kv_heads) <= FOLDED_ROWS
    return bool(spec.softcap) or few


def _mask(spec: AttentionSpec, query_at: Tensor, key_at: Tensor, high: Tensor) -> Tensor:
    """query_at `[batch, queries]`, key_at `[batch, keys]`, high `[batch, 1]` -> the mask."""
    seen = (key_at < high).unsqueeze(1)
    if spec.causal:
        distance = query_at.unsqueeze(2) - key_at.unsqueeze(1)
        seen = seen & (distance >= 0)
        if spec.sliding_window is not None:
            seen &= distance < spec.sliding_window
    mask = torch.zeros(seen.shape, device=seen.device)
    return mask.masked_fill_(~seen, float("-inf")).unsqueeze(1)


def _alibi(spec: AttentionSpec, query_at: Tensor, key_at: Tensor) -> tuple[Tensor, Tensor] | None:
    """`Group.alibi`. The product is left to each layer: those of a step, kept until its end, would
    take as much memory as all its scores."""
    if not spec.alibi_slopes:
        return None
    slopes = to_accelerator(torch.tensor(spec.alibi_slopes).view(-1, 1, 1), query_at.device)
    return slopes, (query_at.unsqueeze(2) - key_at.unsqueeze(1)).abs().float().unsqueeze(1)
