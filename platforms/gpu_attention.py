"""Paged attention on a GPU by the portable Triton kernels."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels_cuda.portable import attention, cache
from ..kernels_cuda.portable.paged import PagedCache
from ..kernels_cuda.portable.tuning import Table
from .attention_reference import quantize_vectors, rounded
from .interface import (
    AttentionBatch,
    AttentionImpl,
    AttentionSpec,
    Device,
    LayerKV,
    Support,
)
from .kv_layout import block_bytes, whole_blocks
from .transfers import movable, to_accelerator

GRAIN = 16
"""A matrix instruction's rows: block sizes and head sizes are multiples of it."""
MAX_GROUP = 64
"""Most query heads of a KV head: the rows of one tile."""
COMPUTED = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(slots=True)
class Metadata:
    """A step's sequences on the device, and ALiBi's slopes. How its layers are launched is decided
    when the first of them is: a step that is replayed needs no decision."""

    sequences: attention.Sequences
    slopes: Tensor | None
    decide: Callable[[], attention.Plan]
    decided: attention.Plan | None = None

    @property
    def plan(self) -> attention.Plan:
        if self.decided is None:
            self.decided = self.decide()
        return self.decided


class TritonAttention(AttentionImpl):
    """Keys and values `[blocks, kv_heads, block_size, head_dim]`; an int8 cache has their scales
    beside them, fp32 `[blocks, kv_heads, block_size]` each."""

    name = "triton"
    priority = 10
    layout = "HND"

    def __init__(self, table: Table) -> None:
        self._table = table
        self._slopes: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}

    def supports(self, spec: AttentionSpec) -> Support:
        if reason := self._refusal(spec):
            return Support.no(reason)
        return Support.yes(f"portable Triton, tuned for {self._table.architecture}")

    def _refusal(self, spec: AttentionSpec) -> str:
        if spec.num_heads % spec.num_kv_heads:
            return f"{spec.num_heads} heads over {spec.num_kv_heads} KV heads"
        if spec.num_heads // spec.num_kv_heads > MAX_GROUP:
            return f"more than {MAX_GROUP} heads share a KV head"
        most = self._table.max_head_dim
        if spec.head_dim % GRAIN or spec.head_dim > most:
            return f"head_dim {spec.head_dim}: it takes multiples of {GRAIN} up to {most}"
        if spec.block_size % GRAIN:
            return f"block_size {spec.block_size}: it takes multiples of {GRAIN}"
        if spec.dtype not in COMPUTED or not self._keeps(spec.kv_dtype):
            return f"no kernel for {spec.dtype} over {spec.kv_dtype} on {self._table.architecture}"
        return ""

    def _keeps(self, dtype: torch.dtype) -> bool:
        """Of the float8 kinds a card converts its own only."""
        known = (*COMPUTED, torch.int8)
        return dtype in known or str(dtype).removeprefix("torch.") in self._table.fp8

    def alloc(self, device: Device, spec: AttentionSpec, num_blocks: int) -> LayerKV:
        shape = (num_blocks, spec.num_kv_heads, spec.block_size, spec.head_dim)
        tensors = [device.alloc_kv(shape, spec.kv_dtype) for _ in range(2)]
        if spec.kv_dtype == torch.int8:
            tensors += [device.alloc_kv(shape[:-1], torch.float32) for _ in range(2)]
        return whole_blocks(tensors)

    def block_bytes(self, spec: AttentionSpec) -> int:
        return block_bytes(spec)

    def plan(self, spec: AttentionSpec, batch: AttentionBatch) -> Metadata:
        device = batch.block_tables.device
        both = torch.tensor([*batch.query_starts, *batch.seq_lens], dtype=torch.int32)
        there = to_accelerator(both, device)
        starts, lens = there[: len(batch.query_starts)], there[len(batch.query_starts) :]
        edges = zip(batch.query_starts, batch.query_starts[1:], strict=False)
        most = max(stop - start for start, stop in edges)
        longest = max(batch.seq_lens)
        return self._planned(
            spec, attention.Sequences(batch.block_tables, starts, lens, most, longest)
        )

    def plan_recorded(
        self, spec: AttentionSpec, block_tables: Tensor, seq_lens: Tensor
    ) -> Metadata:
        """How keys are split over programs is decided on the device, whatever the lengths."""
        seqs, width = block_tables.shape
        starts = torch.arange(seqs + 1, dtype=torch.int32, device=block_tables.device)
        longest = width * spec.block_size
        return self._planned(spec, attention.Sequences(block_tables, starts, seq_lens, 1, longest))

    def _planned(self, spec: AttentionSpec, sequences: attention.Sequences) -> Metadata:
        slopes = None
        if spec.alibi_slopes:
            device = sequences.block_tables.device
            slopes = self._slopes.get((spec.alibi_slopes, device))
            if slopes is None:
                slopes = to_accelerator(torch.tensor(spec.alibi_slopes), device)
                self._slopes[spec.alibi_slopes, device] = slopes
        decide = functools.partial(attention.plan, spec, sequences, self._table)
        return Metadata(sequences, slopes, decide)

    def write(self, key: Tensor, value: Tensor, kv: LayerKV, slots: Tensor) -> None:
        cache.write(key, value, paged(kv), slots, self._table)

    def rope_write(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotation: cache.Rotation,
        kv: LayerKV,
        slots: Tensor,
        norms: cache.HeadNorms | None,
    ) -> Tensor:
        """Norms, rotation and `write` in one launch; returns the query."""
        kept = paged(kv)
        return cache.rope_write(query, key, value, rotation, kept, slots, self._table, norms)

    def run(self, query: Tensor, kv: LayerKV, spec: AttentionSpec, metadata: Metadata) -> Tensor:
        kept = paged(kv)
        return attention.attend(query, kept, metadata.plan, slopes=metadata.slopes)

    def export_blocks(self, kv: LayerKV, spec: AttentionSpec, blocks: Tensor) -> Tensor:
        found = torch.stack([movable(kept).index_select(0, blocks) for kept in kv.tensors[:2]])
        found = found.view(spec.kv_dtype)
        if spec.kv_dtype == torch.int8:
            scales = torch.stack([scale.index_select(0, blocks) for scale in kv.tensors[2:]])
            found = found.float() * scales.unsqueeze(-1)
        return found.transpose(2, 3).contiguous()

    def import_blocks(
        self, kv: LayerKV, spec: AttentionSpec, blocks: Tensor, canonical: Tensor
    ) -> None:
        new = canonical.transpose(2, 3)
        quantized = spec.kv_dtype == torch.int8
        parts = [*quantize_vectors(new)] if quantized else [rounded(new, spec.kv_dtype)]
        tensors = zip(kv.tensors, (half for part in parts for half in part), strict=True)
        for kept, half in tensors:
            movable(kept).index_copy_(0, blocks, movable(half))


def paged(kv: LayerKV) -> PagedCache:
    """A layer's cache as the kernels take it."""
    keys, values = kv.tensors[:2]
    if len(kv.tensors) == 2:
        return PagedCache(keys, values)
    return PagedCache(keys, values, kv.tensors[2], kv.tensors[3])
