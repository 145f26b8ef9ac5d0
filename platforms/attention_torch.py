"""Paged attention by padded torch calls: gather, one fused attention call, scatter, per group.

It computes in fp32, whatever the model's dtype, with one exception. Not every processor multiplies
16-bit numbers; where one does, oneDNN would compile and keep code for each combination of sizes
that it meets. Where none does, decode in bfloat16 is one call of torch's own loop, which widens as
it goes; on a GPU decode is one fused call too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_plan import Group, Plan, make_plan
from .host_device import onednn_multiplies_bfloat16
from .interface import (
    AttentionBatch,
    AttentionImpl,
    AttentionSpec,
    Device,
    LayerKV,
    Support,
)
from .kv_layout import block_bytes, whole_blocks


class TorchPagedAttention(AttentionImpl):
    """Keys and values lie in two tensors `[blocks, block_size, kv_heads, head_dim]`."""

    name = "torch"
    priority = 0
    layout = "NHD"

    def supports(self, spec: AttentionSpec) -> Support:
        if spec.num_heads % spec.num_kv_heads:
            return Support.no(f"{spec.num_heads} heads over {spec.num_kv_heads} KV heads")
        if spec.kv_dtype.itemsize == 1:
            return Support.no(
                f"it keeps no cache in 8 bits ({spec.kv_dtype}): torch's attention reads keys and "
                "values in 16 and 32 bits only"
            )
        return Support.yes("padded torch calls")

    def alloc(self, device: Device, spec: AttentionSpec, num_blocks: int) -> LayerKV:
        shape = (num_blocks, spec.block_size, spec.num_kv_heads, spec.head_dim)
        return whole_blocks([device.alloc_kv(shape, spec.kv_dtype) for _ in range(2)])

    def block_bytes(self, spec: AttentionSpec) -> int:
        return block_bytes(spec)

    def plan(self, spec: AttentionSpec, batch: AttentionBatch) -> Plan:
        return make_plan(spec, batch)

    def write(self, key: Tensor, value: Tensor, kv: LayerKV, slots: Tensor) -> None:
        for cache, new in zip(kv.tensors, (key, value), strict=True):
            cache.flatten(0, 1).index_copy_(0, slots, new.to(cache.dtype))

    def run(self, query: Tensor, kv: LayerKV, spec: AttentionSpec, metadata: Plan) -> Tensor:
        groups = metadata.groups
        if len(groups) == 1 and groups[0].rows is None:
            key, value = _gather(kv, spec, groups[0], metadata)
            return _attend(query, key, value, spec, groups[0]).flatten(0, 1).to(query.dtype)
        output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
        for group in groups:
            key, value = _gather(kv, spec, group, metadata)
            if group.rows is None:
                rows = slice(group.start, group.start + group.batch * group.queries)
                output[rows] = _attend(query[rows], key, value, spec, group).flatten(0, 1)
                continue
            padded = query.index_select(0, group.rows)
            found = _attend(padded, key, value, spec, group).flatten(0, 1)
            target = group.rows
            if group.valid is not None:
                found = found.index_select(0, group.valid)
                target = target.index_select(0, group.valid)
            output.index_copy_(0, target, found.to(output.dtype))
        return output

    def export_blocks(self, kv: LayerKV, spec: AttentionSpec, blocks: Tensor) -> Tensor:
        return torch.stack([cache.index_select(0, blocks) for cache in kv.tensors])

    def import_blocks(
        self, kv: LayerKV, spec: AttentionSpec, blocks: Tensor, canonical: Tensor
    ) -> None:
        for cache, new in zip(kv.tensors, canonical, strict=True):
            cache.index_copy_(0, blocks, new)


def _gather(kv: LayerKV, spec: AttentionSpec, group: Group, plan: Plan) -> tuple[Tensor, Tensor]:
    """Keys and values in the cache's dtype, each `[batch * kv_heads, keys, head_dim]`."""
    shape = (group.batch * spec.num_kv_heads, group.keys, spec.head_dim)
    key, value = (
        torch.index_select(
            cache.view(-1, spec.head_dim), 0, group.slots, out=scratch[: len(group.slots)]
        ).view(shape)
        for cache, scratch in zip(kv.tensors, plan.scratch, strict=True)
    )
    return key, value


def _attend(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, group: Group) -> Tensor:
    """query `[batch * queries, heads, head_dim]` -> `[batch, queries, heads, head_dim]`, in fp32 or
    the query's dtype."""
    query = query.view(group.batch, group.queries, spec.num_heads, spec.head_dim)
    # Distances of ALiBi do not fit 16 bits, and softcap wants fp32.
    plain = not spec.softcap and not spec.alibi_slopes
    if group.queries == 1 and plain and _widens_itself(query, key):
        return _by_heads(query, key, value, spec, group)
    by = _by_products if group.folded else _by_fused_call
    return by(query.float(), key.float(), value.float(), spec, group)


def _widens_itself(query: Tensor, key: Tensor) -> bool:
    """Does torch's fused call take 16-bit numbers and sum in fp32? A GPU's kernels do; on a
    processor its own loop for bfloat16 does, where oneDNN has no code by size instead."""
    if query.dtype != key.dtype:
        return False
    if query.device.type != "cpu":
        return query.dtype != torch.float32
    return query.dtype == torch.bfloat16 and not onednn_multiplies_bfloat16()


def _by_heads(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, group: Group
) -> Tensor:
    """One query a sequence: the heads that share a KV head are its queries."""
    folded = (group.batch, spec.num_kv_heads, -1, spec.head_dim)
    return F.scaled_dot_product_attention(
        query.view(folded),
        key.view(folded),
        value.view(folded),
        attn_mask=None if group.mask is None else group.mask.to(query.dtype),
        scale=spec.scale,
    ).reshape(query.shape)


def _by_fused_call(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, group: Group
) -> Tensor:
    heads = spec.num_heads // spec.num_kv_heads
    split = (group.batch, spec.num_kv_heads, group.keys, spec.head_dim)
    return F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.view(split).repeat_interleave(heads, dim=1),
        value.view(split).repeat_interleave(heads, dim=1),
        attn_mask=_added(group),
        is_causal=group.causal,
        scale=spec.scale,
    ).transpose(1, 2)


def _by_products(
    query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec, group: Group
) -> Tensor:
    batch, queries, kv_heads = group.batch, group.queries, spec.num_kv_heads
    heads = spec.num_heads // kv_heads
    by_head = (batch, queries, kv_heads, heads, spec.head_dim)
    folded = query.view(by_head).permute(0, 2, 3, 1, 4).reshape(len(key), -1, spec.head_dim)
    scores = torch.bmm(folded, key.transpose(1, 2)).mul_(spec.scale)
    if spec.softcap:
        scores = scores.div_(spec.softcap).tanh_().mul_(spec.softcap)
    if (added := _added(group)) is not None:
        scores.view(batch, kv_heads * heads, queries, group.keys).add_(added)
    found = torch.bmm(scores.softmax(dim=-1), value)
    found = found.view(batch, kv_heads, heads, queries, spec.head_dim).permute(0, 3, 1, 2, 4)
    return found.reshape(query.shape)


def _added(group: Group) -> Tensor | None:
    """What is added to the scores, `[batch, 1 or heads, queries, keys]`; None: nothing."""
    if group.alibi is None:
        return group.mask
    slopes, distances = group.alibi
    lower = distances * -slopes
    return lower if group.mask is None else lower.add_(group.mask)
