"""Paged attention by padded torch calls: gather, one fused attention call, scatter, per group."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_plan import Group, build, bundle, cut
from .interface import (
    AttentionBatch,
    AttentionImpl,
    AttentionSpec,
    Device,
    KVRegion,
    LayerKV,
    Support,
)


class TorchPagedAttention(AttentionImpl):
    """Keys and values lie in two tensors `[blocks, block_size, kv_heads, head_dim]`."""

    name = "torch"
    priority = 0

    def supports(self, spec: AttentionSpec) -> Support:
        if spec.num_heads % spec.num_kv_heads:
            return Support.no(f"{spec.num_heads} heads over {spec.num_kv_heads} KV heads")
        return Support.yes("padded torch calls")

    def alloc(self, device: Device, spec: AttentionSpec, num_blocks: int) -> LayerKV:
        shape = (num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim)
        both = tuple(device.alloc_kv(shape, spec.kv_dtype) for _ in range(2))
        size = self.block_bytes(spec) // 2
        return LayerKV(both, tuple(KVRegion(tensor, size, size) for tensor in both))

    def block_bytes(self, spec: AttentionSpec) -> int:
        elements = 2 * spec.block_size * spec.num_kv_heads * spec.head_dim
        return elements * spec.kv_dtype.itemsize

    def plan(self, spec: AttentionSpec, batch: AttentionBatch) -> list[Group]:
        return [build(spec, batch, pieces) for pieces in bundle(spec, cut(spec, batch))]

    def write(self, key: Tensor, value: Tensor, kv: LayerKV, slots: Tensor) -> None:
        for cache, new in zip(kv.tensors, (key, value), strict=True):
            cache.flatten(0, 1).index_copy_(0, slots, new.to(cache.dtype))

    def run(self, query: Tensor, kv: LayerKV, spec: AttentionSpec, metadata: list[Group]) -> Tensor:
        if len(metadata) == 1 and metadata[0].rows is None:
            return _attend(query, kv, spec, metadata[0]).reshape(query.shape)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for group in metadata:
            if group.rows is None:
                stop = group.start + group.batch * group.queries
                rows = output[group.start : stop]
                rows.copy_(_attend(query[group.start : stop], kv, spec, group).view_as(rows))
                continue
            found = _attend(query.index_select(0, group.rows), kv, spec, group).flatten(0, 1)
            rows = group.rows
            if group.valid is not None:
                found, rows = found.index_select(0, group.valid), rows.index_select(0, group.valid)
            output.index_copy_(0, rows, found)
        return output


def _attend(query: Tensor, kv: LayerKV, spec: AttentionSpec, group: Group) -> Tensor:
    """query `[batch * queries, heads, head_dim]` -> `[batch, queries, heads, head_dim]`."""
    key, value = (
        cache.flatten(0, 1)
        .index_select(0, group.slots)
        .view(group.batch, group.keys, spec.num_kv_heads, spec.head_dim)
        .transpose(1, 2)
        .to(query.dtype)
        for cache in kv.tensors
    )
    if group.queries == 1:
        return _attend_folded(query, key, value, spec, group)
    query = query.view(group.batch, group.queries, spec.num_heads, spec.head_dim).transpose(1, 2)
    heads = spec.num_heads // spec.num_kv_heads
    key, value = key.repeat_interleave(heads, dim=1), value.repeat_interleave(heads, dim=1)
    return _sdpa(query, key, value, spec, group).transpose(1, 2)


def _attend_folded(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, group: Group
) -> Tensor:
    """One query a sequence: the heads that share a KV head become its queries."""
    heads = spec.num_heads // spec.num_kv_heads
    folded = query.view(group.batch, spec.num_kv_heads, heads, spec.head_dim)
    found = _sdpa(folded, key, value, spec, group)
    return found.reshape(group.batch, 1, spec.num_heads, spec.head_dim)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, group: Group) -> Tensor:
    """`[batch, heads, queries, head_dim]` all of them; the mask broadcasts over heads."""
    if spec.softcap:
        return _softcapped(query, key, value, spec, group)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=group.mask, is_causal=group.causal, scale=spec.scale
    )


def _softcapped(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, group: Group
) -> Tensor:
    scores = torch.matmul(query, key.transpose(2, 3)).float() * spec.scale
    scores = spec.softcap * torch.tanh(scores / spec.softcap)
    mask = group.mask
    if group.causal:
        mask = torch.ones(group.queries, group.keys, dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.matmul(scores.softmax(dim=-1).to(query.dtype), value)
