"""FlashInfer on NVIDIA's cards, where it is installed."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from .gpu_library_attention import Library, LibraryAttention
from .interface import AttentionBatch, AttentionSpec, Device, LayerKV
from .transfers import to_accelerator

WORKSPACE = 128 << 20
"""Bytes, as its documentation recommends."""
PLANS = 2
"""Plans that are kept apart: one step runs while the next is planned."""


class FlashInfer(LibraryAttention):
    """Prompts and single tokens alike go through its batched prefill. A plan belongs to its
    wrapper; the wrappers take turns, and share what they work in."""

    name = "flashinfer"
    library = Library(
        "flashinfer", "flashinfer-python", ">=0.2,<1", ("sm_8", "sm_9", "sm_10", "sm_12")
    )
    head_dims = (64, 128, 256)

    def __init__(self, cards: Collection[str]) -> None:
        super().__init__(cards)
        self._workspaces: dict[torch.device, Tensor] = {}
        self._wrappers: dict[torch.device, list[Any]] = {}

    def alloc(self, device: Device, spec: AttentionSpec, num_blocks: int) -> LayerKV:
        if device.torch_device not in self._workspaces:
            made = device.alloc((WORKSPACE,), torch.uint8, tag="workspace")
            self._workspaces[device.torch_device] = made
        return super().alloc(device, spec, num_blocks)

    def plan(self, spec: AttentionSpec, batch: AttentionBatch) -> Any:
        """Its plan is made on the host, of numbers there: nothing is waited for."""
        pages = [-(-length // spec.block_size) for length in batch.seq_lens]
        last = [
            length - (count - 1) * spec.block_size
            for length, count in zip(batch.seq_lens, pages, strict=True)
        ]
        starts = torch.tensor([0, *pages]).cumsum(0).int()
        wrapper = self._next_wrapper(batch.block_tables.device)
        wrapper.plan(
            torch.tensor(batch.query_starts, dtype=torch.int32),
            starts,
            _pages_of(batch.block_tables, pages),
            torch.tensor(last, dtype=torch.int32),
            spec.num_heads,
            spec.num_kv_heads,
            spec.head_dim,
            spec.block_size,
            causal=spec.causal,
            sm_scale=spec.scale,
            q_data_type=spec.dtype,
            kv_data_type=spec.kv_dtype,
        )
        return wrapper

    def _next_wrapper(self, device: torch.device) -> Any:
        wrappers = self._wrappers.setdefault(device, [])
        if len(wrappers) < PLANS:
            make = self.module.BatchPrefillWithPagedKVCacheWrapper
            wrappers.append(make(self._workspaces[device], self.layout))
        else:
            wrappers.append(wrappers.pop(0))
        return wrappers[-1]

    def run(self, query: Tensor, kv: LayerKV, spec: AttentionSpec, metadata: Any) -> Tensor:
        found: Tensor = metadata.run(query.contiguous(), kv.tensors)
        return found


def _pages_of(tables: Tensor, pages: list[int]) -> Tensor:
    """int32: the blocks of each sequence that hold tokens, one after another, on the device."""
    at = [torch.arange(count) + row * tables.shape[1] for row, count in enumerate(pages)]
    return tables.reshape(-1).index_select(0, to_accelerator(torch.cat(at), tables.device))
