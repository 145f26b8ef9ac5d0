"""FlashAttention 2 and 3 on NVIDIA's cards, where they are installed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .gpu_library_attention import Library, LibraryAttention
from .interface import AttentionSpec, LayerKV


class VarlenAttention(LibraryAttention):
    """By `flash_attn_varlen_func` over a block table, which AITER has from FlashAttention 2."""

    def run(self, query: Tensor, kv: LayerKV, spec: AttentionSpec, metadata: Any) -> Tensor:
        found: Tensor = self.module.flash_attn_varlen_func(
            query,
            *kv.tensors,
            cu_seqlens_q=metadata.query_starts,
            cu_seqlens_k=metadata.key_starts,
            max_seqlen_q=metadata.max_queries,
            max_seqlen_k=metadata.max_keys,
            softmax_scale=spec.scale,
            causal=spec.causal,
            block_table=metadata.tables,
        )
        return found


class FlashAttention2(VarlenAttention):
    """Blocks of 256 tokens or multiples (`csrc/flash_attn/flash_api.cpp`, `mha_varlen_fwd`)."""

    name = "flash-attention-2"
    library = Library("flash_attn", "flash-attn", ">=2.6,<3", ("sm_8", "sm_9", "sm_10", "sm_12"))
    block_multiple = 256


class FlashAttention3(LibraryAttention):
    """Hopper's; blocks of any size (`hopper/flash_attn_interface.py`)."""

    name = "flash-attention-3"
    library = Library("flash_attn_interface", "flash_attn_3", ">=3.0.0b1,<4", ("sm_90",))

    def run(self, query: Tensor, kv: LayerKV, spec: AttentionSpec, metadata: Any) -> Tensor:
        found: Tensor = self.module.flash_attn_with_kvcache(
            query,
            *kv.tensors,
            cache_seqlens=metadata.lens,
            page_table=metadata.tables,
            cu_seqlens_q=metadata.query_starts,
            max_seqlen_q=metadata.max_queries,
            softmax_scale=spec.scale,
            causal=spec.causal,
        )
        return found
