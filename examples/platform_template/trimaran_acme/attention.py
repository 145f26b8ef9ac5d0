"""Paged attention. VENDOR: your kernel, over the cache layout that it likes best."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from trimaran.platforms import interface as tri


class AcmeAttention(tri.AttentionImpl):
    """The cache is `[blocks, block_size, 2, kv_heads, head_dim]`: a token's key and value are
    neighbours, and a block is one piece."""

    name = "acme"
    layout = "acme"

    def supports(self, spec: tri.AttentionSpec) -> tri.Support:
        known = spec.causal and not spec.alibi_slopes
        return tri.Support.yes() if known else tri.Support.no("causal attention without ALiBi")

    def alloc(self, device: tri.Device, spec: tri.AttentionSpec, num_blocks: int) -> tri.LayerKV:
        shape = (num_blocks, spec.block_size, 2, spec.num_kv_heads, spec.head_dim)
        cache, size = device.alloc_kv(shape, spec.kv_dtype), self.block_bytes(spec)
        return tri.LayerKV((cache,), (tri.KVRegion(cache, size, size),))

    def block_bytes(self, spec: tri.AttentionSpec) -> int:
        return 2 * spec.block_size * spec.num_kv_heads * spec.head_dim * spec.kv_dtype.itemsize

    def plan(self, spec: tri.AttentionSpec, batch: tri.AttentionBatch) -> Any:
        planned = []  # each sequence: its query rows, its keys' slots, what each query must not see
        rows = [slice(*pair) for pair in pairwise(batch.query_starts)]
        for row, length, table in zip(rows, batch.seq_lens, batch.block_tables, strict=True):
            first = length - (row.stop - row.start)  # the first query's position
            window = spec.sliding_window or length
            keys = torch.arange(max(0, first - window + 1), length, device=table.device)
            slots = table.long()[keys // spec.block_size] * spec.block_size + keys % spec.block_size
            distance = torch.arange(first, length, device=table.device).unsqueeze(1) - keys
            planned.append((row, slots, (distance < 0) | (distance >= window)))
        return planned

    def write(self, key: Tensor, value: Tensor, kv: tri.LayerKV, slots: Tensor) -> None:
        tokens = kv.tensors[0].flatten(0, 1)
        tokens.index_copy_(0, slots, torch.stack((key, value), 1).to(tokens.dtype))

    def run(self, query: Tensor, kv: tri.LayerKV, spec: tri.AttentionSpec, metadata: Any) -> Tensor:
        tokens, output = kv.tensors[0].flatten(0, 1), torch.zeros_like(query)
        for rows, slots, hidden in metadata:
            key, value = tokens[slots].float().unbind(1)  # each [keys, kv_heads, head_dim]
            grouped = query[rows].float().reshape(len(hidden), spec.num_kv_heads, -1, spec.head_dim)
            scores = torch.einsum("qngd,knd->ngqk", grouped, key) * spec.scale
            if spec.softcap:
                scores = spec.softcap * torch.tanh(scores / spec.softcap)
            shares = scores.masked_fill(hidden, float("-inf")).softmax(-1)
            output[rows] = torch.einsum("ngqk,knd->qngd", shares, value).flatten(1, 2)
        return output

    def export_blocks(self, kv: tri.LayerKV, spec: tri.AttentionSpec, blocks: Tensor) -> Tensor:
        return kv.tensors[0][blocks].permute(2, 0, 1, 3, 4).contiguous()

    def import_blocks(
        self, kv: tri.LayerKV, spec: tri.AttentionSpec, blocks: Tensor, canonical: Tensor
    ) -> None:
        kv.tensors[0][blocks] = canonical.permute(1, 2, 0, 3, 4)
