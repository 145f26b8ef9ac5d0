"""Attention one sequence at a time, in fp32: slow, and meant to be obviously right."""

from __future__ import annotations

import torch
from torch import Tensor

from .interface import (
    AttentionBatch,
    AttentionImpl,
    AttentionSpec,
    Device,
    LayerKV,
    Support,
)
from .kv_layout import block_bytes, whole_blocks
from .transfers import to_accelerator


def attend(query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
    """Softmax attention (Vaswani et al. 2017, eq. 1) of the last queries of one sequence.

    query `[queries, heads, head_dim]`, key and value `[keys, kv_heads, head_dim]`; the last query
    stands at the last key's position. Head h reads KV head h // (heads / kv_heads). Softcap
    squeezes scores to c * tanh(score / c) (Gemma 2, 2024, section 2); then ALiBi lowers them by
    slope * distance (Press et al. 2022, section 3). fp32 throughout; returns `[queries, heads,
    head_dim]` in fp32.
    """
    group = spec.num_heads // spec.num_kv_heads
    key = key.float().repeat_interleave(group, dim=1)  # [keys, heads, head_dim]
    value = value.float().repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query.float(), key) * spec.scale
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    if spec.alibi_slopes:
        slopes = to_accelerator(torch.tensor(spec.alibi_slopes).view(-1, 1, 1), query.device)
        scores -= slopes * distances(len(query), len(key), query.device).abs()
    seen = visible(len(query), len(key), spec, query.device)
    scores = scores.masked_fill(~seen, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(dim=-1), value)


def visible(queries: int, keys: int, spec: AttentionSpec, device: torch.device) -> Tensor:
    """bool `[queries, keys]`: which keys each query sees."""
    if not spec.causal:
        return torch.ones(queries, keys, dtype=torch.bool, device=device)
    distance = distances(queries, keys, device)
    seen = distance >= 0
    return seen if spec.sliding_window is None else seen & (distance < spec.sliding_window)


def distances(queries: int, keys: int, device: torch.device) -> Tensor:
    """int64 `[queries, keys]`: how many positions each query stands behind each key."""
    query_at = torch.arange(keys - queries, keys, device=device).unsqueeze(1)
    return query_at - torch.arange(keys, device=device)


def quantize_vectors(vectors: Tensor) -> tuple[Tensor, Tensor]:
    """`[..., head_dim]` -> int8 codes of that shape and fp32 scales `[...]`, max|x| / 127 of each
    vector (one token's key or value in one head); a value is code * scale. Vectors that are not
    finite have a scale of NaN, so that what was not a number does not become one."""
    wide = vectors.float()
    scales = wide.abs().amax(dim=-1) / 127
    divisor = torch.where(scales > 0, scales, 1.0).unsqueeze(-1)
    codes = (wide / divisor).round().clamp(-127, 127).nan_to_num().to(torch.int8)
    return codes, torch.where(scales.isfinite(), scales, torch.nan)


def rounded(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """What a cache in the floating-point `dtype` keeps: the nearest number, of a float8 at most its
    largest one (not every kind has an infinity); NaN stays NaN."""
    if dtype.itemsize > 1 or vectors.dtype == dtype:
        return vectors.to(dtype)
    most = torch.finfo(dtype).max
    return vectors.float().clamp(-most, most).to(dtype)


class ReferenceAttention(AttentionImpl):
    """The oracle. Its cache is one tensor `[blocks, 2, kv_heads, block_size, head_dim]` (keys,
    then values): on purpose not the layout of other implementations, so that shared code which
    assumes one is found out. A cache in float8 holds what `rounded` gives, without a scale; one in
    int8 has the scales of `quantize_vectors` in a second one, `[blocks, 2, kv_heads,
    block_size]`."""

    name = "reference"
    priority = -100
    layout = "HND"

    def supports(self, spec: AttentionSpec) -> Support:
        return Support.yes("plain torch")

    def alloc(self, device: Device, spec: AttentionSpec, num_blocks: int) -> LayerKV:
        shape = (num_blocks, 2, spec.num_kv_heads, spec.block_size, spec.head_dim)
        tensors = [device.alloc_kv(shape, spec.kv_dtype)]
        if spec.kv_dtype == torch.int8:
            tensors.append(device.alloc_kv(shape[:-1], torch.float32))
        return whole_blocks(tensors)

    def block_bytes(self, spec: AttentionSpec) -> int:
        return block_bytes(spec)

    def plan(self, spec: AttentionSpec, batch: AttentionBatch) -> AttentionBatch:
        return batch

    def write(self, key: Tensor, value: Tensor, kv: LayerKV, slots: Tensor) -> None:
        size = kv.tensors[0].shape[3]
        block, offset = slots.long() // size, slots.long() % size
        for which, new in enumerate((key, value)):
            for tensor, part in zip(kv.tensors, _stored(new, kv), strict=True):
                tensor[block, which, :, offset] = part

    def run(
        self, query: Tensor, kv: LayerKV, spec: AttentionSpec, metadata: AttentionBatch
    ) -> Tensor:
        output = torch.zeros_like(query)
        for i, length in enumerate(metadata.seq_lens):
            start, end = metadata.query_starts[i], metadata.query_starts[i + 1]
            if start == end:
                continue
            first = _first_key(spec, length, end - start)
            at = torch.arange(first, length, device=query.device)
            blocks = metadata.block_tables[i].long()[at // spec.block_size]
            found = [tensor[blocks, :, :, at % spec.block_size] for tensor in kv.tensors]
            both = _values(*found)  # [keys, 2, kv_heads, head_dim]
            output[start:end] = attend(query[start:end], both[:, 0], both[:, 1], spec)
        return output

    def export_blocks(self, kv: LayerKV, spec: AttentionSpec, blocks: Tensor) -> Tensor:
        found = _values(*(tensor[blocks] for tensor in kv.tensors))
        return found.permute(1, 0, 3, 2, 4).contiguous()

    def import_blocks(
        self, kv: LayerKV, spec: AttentionSpec, blocks: Tensor, canonical: Tensor
    ) -> None:
        new = canonical.permute(1, 0, 3, 2, 4)
        for tensor, part in zip(kv.tensors, _stored(new, kv), strict=True):
            tensor[blocks] = part


def _stored(vectors: Tensor, kv: LayerKV) -> tuple[Tensor, ...]:
    """What each of the cache's tensors keeps of `[..., head_dim]`."""
    if len(kv.tensors) == 1:
        return (rounded(vectors, kv.tensors[0].dtype),)
    return quantize_vectors(vectors)


def _values(codes: Tensor, scales: Tensor | None = None) -> Tensor:
    """What was stored, `[..., head_dim]`; in fp32 where it was quantized."""
    return codes if scales is None else codes.float() * scales.unsqueeze(-1)


def _first_key(spec: AttentionSpec, length: int, queries: int) -> int:
    """The oldest position any of the last `queries` queries sees; older blocks may be gone."""
    if spec.sliding_window is None or not spec.causal:
        return 0
    return max(0, length - queries - spec.sliding_window + 1)
