"""Attention implementations with one bug each, all on the reference's layout."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from trimaran.platforms.attention_reference import ReferenceAttention
from trimaran.platforms.interface import AttentionSpec, Device, KVRegion, LayerKV, Support


class WrongSlot(ReferenceAttention):
    """Tokens are written one slot before their own, but for the first of a block."""

    def write(self, key: Tensor, value: Tensor, kv: LayerKV, slots: Tensor) -> None:
        size = kv.tensors[0].shape[3]
        super().write(key, value, kv, slots - (slots % size == size - 1).long())


class WindowOffByOne(ReferenceAttention):
    """A query under a window sees one key more."""

    def run(self, query: Tensor, kv: LayerKV, spec: AttentionSpec, metadata: Any) -> Tensor:
        if spec.sliding_window is not None:
            spec = dataclasses.replace(spec, sliding_window=spec.sliding_window + 1)
        return super().run(query, kv, spec, metadata)


class NoSoftcap(ReferenceAttention):
    """Softcap is claimed, and ignored."""

    def run(self, query: Tensor, kv: LayerKV, spec: AttentionSpec, metadata: Any) -> Tensor:
        return super().run(query, kv, dataclasses.replace(spec, softcap=0.0), metadata)


class NoAlibi(ReferenceAttention):
    """ALiBi is claimed, and ignored."""

    def run(self, query: Tensor, kv: LayerKV, spec: AttentionSpec, metadata: Any) -> Tensor:
        return super().run(query, kv, dataclasses.replace(spec, alibi_slopes=()), metadata)


class HeadsInterleaved(ReferenceAttention):
    """Head h reads KV head h % kv_heads, not h // (heads / kv_heads)."""

    def run(self, query: Tensor, kv: LayerKV, spec: AttentionSpec, metadata: Any) -> Tensor:
        group = spec.num_heads // spec.num_kv_heads
        shape = (len(query), group, spec.num_kv_heads, spec.head_dim)
        turned = query.view(shape).transpose(1, 2).reshape(query.shape)
        found = super().run(turned, kv, spec, metadata)
        back = (len(query), spec.num_kv_heads, group, spec.head_dim)
        return found.view(back).transpose(1, 2).reshape(query.shape)


class ReadsWholeBlocks(ReferenceAttention):
    """The unused slots of a sequence's last block are read, and multiplied by zero."""

    def run(self, query: Tensor, kv: LayerKV, spec: AttentionSpec, metadata: Any) -> Tensor:
        found = super().run(query, kv, spec, metadata)
        for i, length in enumerate(metadata.seq_lens):
            start, end = metadata.query_starts[i], metadata.query_starts[i + 1]
            block = int(metadata.block_tables[i][(length - 1) // spec.block_size])
            stale = kv.tensors[0][block, 1].float().sum()
            found[start:end] += (stale * 0).to(found.dtype)
        return found


class KeysAndValuesSwapped(ReferenceAttention):
    """The canonical form has values first, both ways."""

    def export_blocks(self, kv: LayerKV, spec: AttentionSpec, blocks: Tensor) -> Tensor:
        return super().export_blocks(kv, spec, blocks).flip(0)

    def import_blocks(
        self, kv: LayerKV, spec: AttentionSpec, blocks: Tensor, canonical: Tensor
    ) -> None:
        super().import_blocks(kv, spec, blocks, canonical.flip(0))


class CachedExport(ReferenceAttention):
    """Exported blocks are remembered until the next write or import: moves and scrubs, which go
    through the regions, are not seen."""

    def __init__(self) -> None:
        self._exported: dict[Any, Tensor] = {}

    def write(self, key: Tensor, value: Tensor, kv: LayerKV, slots: Tensor) -> None:
        self._exported.clear()
        super().write(key, value, kv, slots)

    def import_blocks(
        self, kv: LayerKV, spec: AttentionSpec, blocks: Tensor, canonical: Tensor
    ) -> None:
        self._exported.clear()
        super().import_blocks(kv, spec, blocks, canonical)

    def export_blocks(self, kv: LayerKV, spec: AttentionSpec, blocks: Tensor) -> Tensor:
        all_blocks = self._exported.setdefault("all", kv.tensors[0].clone())
        return super().export_blocks(LayerKV((all_blocks,), kv.regions), spec, blocks)

    def alloc(self, device: Device, spec: AttentionSpec, num_blocks: int) -> LayerKV:
        self._exported.clear()
        return super().alloc(device, spec, num_blocks)


class ForgottenRegion(ReferenceAttention):
    """Only the keys are listed as a region (and counted): values stay where they are."""

    def alloc(self, device: Device, spec: AttentionSpec, num_blocks: int) -> LayerKV:
        kv = super().alloc(device, spec, num_blocks)
        size = self.block_bytes(spec)
        return LayerKV(kv.tensors, (KVRegion(kv.tensors[0][:, 0], 2 * size, size),))

    def block_bytes(self, spec: AttentionSpec) -> int:
        return super().block_bytes(spec) // 2


class CountsHalf(ReferenceAttention):
    """A block is said to take half of what it takes."""

    def block_bytes(self, spec: AttentionSpec) -> int:
        return super().block_bytes(spec) // 2


class RefusesDumbly(ReferenceAttention):
    """A refusal that gives no reason."""

    def supports(self, spec: AttentionSpec) -> Support:
        return Support(spec.dtype.itemsize == 4)


class TouchesTheNext(ReferenceAttention):
    """The slot behind a token's, in its block, is cleared: in an engine that writes in order, it is
    written next."""

    def write(self, key: Tensor, value: Tensor, kv: LayerKV, slots: Tensor) -> None:
        size = kv.tensors[0].shape[3]
        behind = slots[slots % size != size - 1] + 1
        zero = key.new_zeros((len(behind), *key.shape[1:]))
        super().write(zero, zero, kv, behind)
        super().write(key, value, kv, slots)


class DriftsApart(ReferenceAttention):
    """Another result each time, each within the tolerance."""

    def __init__(self) -> None:
        self._calls = 0

    def run(self, query: Tensor, kv: LayerKV, spec: AttentionSpec, metadata: Any) -> Tensor:
        self._calls += 1
        return super().run(query, kv, spec, metadata) * (1 + self._calls * 2**-22)


class SortsBlocks(ReferenceAttention):
    """Blocks are imported in order of their numbers, their contents as given."""

    def import_blocks(
        self, kv: LayerKV, spec: AttentionSpec, blocks: Tensor, canonical: Tensor
    ) -> None:
        super().import_blocks(kv, spec, blocks.sort().values, canonical)
