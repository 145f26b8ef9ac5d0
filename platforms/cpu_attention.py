"""Paged attention by the native kernels: `kernels_cpu/csrc/attention.h` and `kv_cache.h`."""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..kernels_cpu.library import ELEMENTS, Call, library, unavailable
from .attention_reference import quantize_vectors
from .cpu_native import Operand
from .interface import (
    AttentionBatch,
    AttentionImpl,
    AttentionSpec,
    Device,
    LayerKV,
    Support,
)
from .kv_layout import SCALE_BYTES, block_bytes, whole_blocks

GRAIN = 16
"""Head sizes and block sizes are multiples of it: the tokens and the dimensions of a vector."""
MAX_HEAD_DIM = 256
SPLIT = 512
"""Keys: a sequence is cut at multiples of it where there is too little work to share."""
TILE_ROWS, TILE_MAX = 96, 256
"""Rows (queries times heads that share a KV head) of a tile: wanted, and at most."""
ITEMS = 4
"""Tiles heavier than 1 / (ITEMS * threads) of all work are cut."""

Ints = NDArray[np.int64]


class Plan(NamedTuple):
    """What the kernel reads at `address`, and what is to stay alive for it: the records (see
    `csrc/attention.h`), the memory of the parts of cut tiles, the block tables."""

    address: int
    records: Ints
    partials: NDArray[np.float32] | None
    block_tables: Tensor


class NativeAttention(AttentionImpl):
    """The cache is one tensor `[blocks, kv_heads, elements]` in the cache's dtype: for each KV head
    the keys of a block, its values, and for int8 their fp32 scales (`csrc/kv_cache.h`)."""

    name = "native"
    priority = 10
    layout = "panels"

    def supports(self, spec: AttentionSpec) -> Support:
        if reason := unavailable() or _refusal(spec):
            return Support.no(reason)
        return Support.yes(f"own kernel, {library().isa}")

    def alloc(self, device: Device, spec: AttentionSpec, num_blocks: int) -> LayerKV:
        elements = block_bytes(spec) // spec.num_kv_heads // spec.kv_dtype.itemsize
        kept = device.alloc_kv((num_blocks, spec.num_kv_heads, elements), spec.kv_dtype)
        return whole_blocks([kept])

    def block_bytes(self, spec: AttentionSpec) -> int:
        return block_bytes(spec)

    def plan(self, spec: AttentionSpec, batch: AttentionBatch) -> Plan:
        return _make_plan(spec, batch)

    def write(self, key: Tensor, value: Tensor, kv: LayerKV, slots: Tensor) -> None:
        key, value = _rows(key), _rows(value)
        call = library().call("kv_write", key.dtype, rows=len(key))
        self.fill_write(call, Operand.of(key), Operand.of(value), kv, slots.data_ptr())
        library().run_one(call)

    def fill_write(self, call: Call, key: Operand, value: Operand, kv: LayerKV, slots: int) -> None:
        """Complete a call of `kv_write`. `slots`: the address of int64 `[rows]`."""
        (kept,) = kv.tensors
        kv_heads, dim = key.shape
        call.input[:3] = key.address, value.address, slots
        call.output[0] = kept.data_ptr()
        call.n[:6] = (
            *(kv_heads, dim, _block_size(kept, dim)),
            *(key.strides[0], value.strides[0], ELEMENTS[kept.dtype]),
        )

    def run(self, query: Tensor, kv: LayerKV, spec: AttentionSpec, metadata: Plan) -> Tensor:
        query = _rows(query)
        out = torch.empty(query.shape, dtype=query.dtype)
        call = library().call("attention", query.dtype, rows=len(query))
        self.fill_run(call, Operand.of(out), Operand.of(query), kv, spec)
        call.input[2] = metadata.address
        library().run_one(call)
        return out

    def fill_run(
        self,
        call: Call,
        out: Operand,
        query: Operand,
        kv: LayerKV,
        spec: AttentionSpec,
        group: int = 0,
    ) -> None:
        """Complete a call of `attention` but for its plan: `input[2]` is the plan's address, or
        null for the plan of cache group `group` among those that are given to the run."""
        slopes = _slopes(spec.alibi_slopes).ctypes.data if spec.alibi_slopes else None
        call.input[:4] = query.address, kv.tensors[0].data_ptr(), None, slopes
        call.output[0] = out.address
        call.n[:10] = (
            *(spec.num_kv_heads, spec.head_dim, spec.block_size, spec.num_heads),
            *(_window(spec), spec.causal, query.strides[0], out.strides[0]),
            *(ELEMENTS[spec.kv_dtype], group),
        )
        call.f[:2] = spec.scale, spec.softcap

    def export_blocks(self, kv: LayerKV, spec: AttentionSpec, blocks: Tensor) -> Tensor:
        key, value = (panel[blocks] for panel in _panels(kv, spec))
        keys = key.permute(0, 3, 1, 2, 4).flatten(3)
        both = torch.stack([keys, value.permute(0, 2, 4, 1, 3).flatten(1, 2)])
        if spec.kv_dtype != torch.int8:
            return both
        scales = torch.stack([scale[blocks] for scale in _scales(kv, spec)])
        return both.float() * scales.transpose(-1, -2).unsqueeze(-1)

    def import_blocks(
        self, kv: LayerKV, spec: AttentionSpec, blocks: Tensor, canonical: Tensor
    ) -> None:
        new = canonical
        if spec.kv_dtype == torch.int8:
            new, scales = quantize_vectors(canonical)
            for kept, scale in zip(_scales(kv, spec), scales, strict=True):
                kept[blocks] = scale.transpose(-1, -2)
        key, value = _panels(kv, spec)
        count, size, kv_heads, dim = new.shape[1:]
        pairs = key.shape[-1]
        keys = new[0].reshape(count, size, kv_heads, dim // pairs, pairs)
        values = new[1].reshape(count, size // pairs, pairs, kv_heads, dim)
        key[blocks] = keys.permute(0, 2, 3, 1, 4)
        value[blocks] = values.permute(0, 3, 1, 4, 2)


def _refusal(spec: AttentionSpec) -> str:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    if spec.num_heads % spec.num_kv_heads:
        return f"{spec.num_heads} heads over {spec.num_kv_heads} KV heads"
    if spec.num_heads // spec.num_kv_heads > TILE_MAX:
        return f"more than {TILE_MAX} heads share a KV head"
    if spec.head_dim % GRAIN or spec.head_dim > MAX_HEAD_DIM:
        return f"head_dim {spec.head_dim}: it takes multiples of {GRAIN} up to {MAX_HEAD_DIM}"
    if spec.block_size % GRAIN:
        return f"block_size {spec.block_size}: it takes multiples of {GRAIN}"
    if spec.dtype not in dtypes or spec.kv_dtype not in (*dtypes, torch.int8):
        return f"no kernel for {spec.dtype} over {spec.kv_dtype}"
    return ""


def _window(spec: AttentionSpec) -> int:
    """Keys that a query sees; 0: all."""
    return (spec.sliding_window or 0) if spec.causal else 0


@functools.cache
def _slopes(slopes: tuple[float, ...]) -> NDArray[np.float32]:
    """As the kernel reads them; kept, because compiled steps hold the address."""
    return np.array(slopes, dtype=np.float32)


def _rows(tensor: Tensor) -> Tensor:
    """With rows that are contiguous inside."""
    return tensor if Operand.of(tensor).inner_is_contiguous else tensor.contiguous()


def _block_size(kept: Tensor, dim: int) -> int:
    """Tokens of a block, of a cache as `alloc` made it."""
    scales = SCALE_BYTES if kept.dtype == torch.int8 else 0
    return kept.shape[-1] // (2 * (dim + scales))


# ---------------------------------------------------------------------------------------------
# The canonical form
# ---------------------------------------------------------------------------------------------


def _panels(kv: LayerKV, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Keys `[blocks, kv_heads, head_dim / p, block_size, p]` and values `[blocks, kv_heads,
    block_size / p, head_dim, p]`: views, p = 2 in bfloat16 and else 1."""
    pairs = 2 if spec.kv_dtype == torch.bfloat16 else 1
    elements = spec.head_dim * spec.block_size
    kept = kv.tensors[0]
    key, value = kept[..., :elements], kept[..., elements : 2 * elements]
    return (
        key.view(*key.shape[:2], spec.head_dim // pairs, spec.block_size, pairs),
        value.view(*value.shape[:2], spec.block_size // pairs, spec.head_dim, pairs),
    )


def _scales(kv: LayerKV, spec: AttentionSpec) -> tuple[Tensor, Tensor]:
    """Of keys and values, each fp32 `[blocks, kv_heads, block_size]`: views."""
    scales = kv.tensors[0][..., 2 * spec.head_dim * spec.block_size :].view(torch.float32)
    return scales[..., : spec.block_size], scales[..., spec.block_size :]


# ---------------------------------------------------------------------------------------------
# The plan of a step
# ---------------------------------------------------------------------------------------------


class _Tiles(NamedTuple):
    """Consecutive queries of one sequence each, and the keys `[begin, end)` they go through.
    `sequence`, `token` and `queries` index the batch; `position` is the first query's."""

    sequence: Ints
    token: Ints
    queries: Ints
    position: Ints
    begin: Ints
    end: Ints

    def take(self, index: Ints) -> _Tiles:
        return _Tiles(*(column[index] for column in self))


TILE_FIELDS, MERGE_FIELDS, HEADER = 7, 4, 2
"""Numbers of `Tile`, `Merge` and `PlanHeader` in `csrc/attention.h`."""


def _make_plan(spec: AttentionSpec, batch: AttentionBatch) -> Plan:
    tiles = _longest_first(_tiles(spec, batch))
    tables = batch.block_tables
    if tables.stride(1) != 1:
        tables = tables.contiguous()
    cut = _cut(tiles, spec, torch.get_num_threads())
    num_merges = 0 if cut is None else len(cut.merged.token)
    parts = tiles if cut is None else cut.parts
    records = np.zeros(
        HEADER + TILE_FIELDS * len(parts.token) + MERGE_FIELDS * num_merges, dtype=np.int64
    )
    records[:HEADER] = len(parts.token), num_merges
    behind = HEADER + TILE_FIELDS * len(parts.token)
    rows = records[HEADER:behind].reshape(-1, TILE_FIELDS).T
    rows[:5] = parts.token, parts.queries, parts.position, parts.begin, parts.end
    rows[5] = tables.data_ptr() + parts.sequence * (tables.stride(0) * tables.element_size())
    if cut is None:
        return Plan(records.ctypes.data, records, None, tables)
    rows[6] = cut.partial
    merges = records[behind:].reshape(-1, MERGE_FIELDS).T
    merges[:] = cut.merged.token, cut.merged.queries, cut.splits, cut.first_partial
    return Plan(records.ctypes.data, records, cut.memory, tables)


def _tiles(spec: AttentionSpec, batch: AttentionBatch) -> _Tiles:
    starts = np.array(batch.query_starts, dtype=np.int64)
    lengths = np.array(batch.seq_lens, dtype=np.int64)
    token, counts = starts[:-1], starts[1:] - starts[:-1]
    sequence, queries, position = np.arange(len(counts)), counts, lengths - counts
    most = max(1, TILE_ROWS * spec.num_kv_heads // spec.num_heads)
    if counts.max() > most or counts.min() < 1:
        sequence, number = _repeat(-(-counts // most))
        queries = np.minimum(most, counts[sequence] - number * most)
        token, position = (one[sequence] + number * most for one in (token, position))
    end = position + queries if spec.causal else lengths[sequence]
    window = _window(spec)
    begin = np.maximum(0, position - window + 1) if window else np.zeros_like(end)
    return _Tiles(sequence, token, queries, position, begin, end)


def _repeat(counts: Ints) -> tuple[Ints, Ints]:
    """Index i `counts[i]` times, and beside it 0, 1, 2…"""
    index = np.repeat(np.arange(len(counts)), counts)
    return index, np.arange(len(index)) - (counts.cumsum() - counts)[index]


def _longest_first(tiles: _Tiles) -> _Tiles:
    """So that no thread begins a long tile while the others end."""
    work = (tiles.end - tiles.begin) * tiles.queries
    return tiles.take(np.argsort(-work, kind="stable")) if len(work) > 1 else tiles


class _Cut(NamedTuple):
    """Heavy tiles cut at multiples of SPLIT keys. `partial`: the address of each part's state, 0
    where a tile was not cut; `merged`: the tiles that were, with the number of their parts."""

    parts: _Tiles
    partial: Ints
    merged: _Tiles
    splits: Ints
    first_partial: Ints
    memory: NDArray[np.float32]


def _cut(tiles: _Tiles, spec: AttentionSpec, threads: int) -> _Cut | None:
    """None: there is enough to share already."""
    if threads == 1:
        return None
    work = (tiles.end - tiles.begin) * tiles.queries
    first = tiles.begin // SPLIT
    splits = (tiles.end - 1) // SPLIT - first + 1
    heavy = work * (ITEMS * threads) > work.sum() * spec.num_kv_heads
    heavy &= splits > 1
    if not heavy.any():
        return None
    splits = np.where(heavy, splits, 1)
    index, number = _repeat(splits)
    border = (first[index] + number) * SPLIT
    parts = tiles.take(index)
    is_part = heavy[index]
    parts = parts._replace(
        begin=np.where(is_part, np.maximum(parts.begin, border), parts.begin),
        end=np.where(is_part, np.minimum(parts.end, border + SPLIT), parts.end),
    )
    rows = parts.queries * (spec.num_heads // spec.num_kv_heads)
    floats = (rows + GRAIN - 1) // GRAIN * (GRAIN * spec.num_kv_heads * (spec.head_dim + 2))
    sizes = np.where(is_part, floats, 0)
    ends = sizes.cumsum()
    memory = np.empty(ends[-1], dtype=np.float32)
    address = memory.ctypes.data + (ends - sizes) * memory.itemsize
    return _Cut(
        parts=parts,
        partial=np.where(is_part, address, 0),
        merged=tiles.take(heavy.nonzero()[0]),
        splits=splits[heavy],
        first_partial=address[is_part & (number == 0)],
        memory=memory,
    )
