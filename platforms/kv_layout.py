"""What the layouts of the built-in attentions have in common."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .interface import AttentionSpec, KVRegion, LayerKV
from .transfers import movable

SCALE_BYTES = torch.float32.itemsize
"""Of a vector in an int8 cache."""


def block_bytes(spec: AttentionSpec) -> int:
    """Of a block's keys and values in `spec.kv_dtype`, with an fp32 scale for each vector of an
    int8 cache, and nothing else."""
    vector = spec.head_dim * spec.kv_dtype.itemsize
    if spec.kv_dtype == torch.int8:
        vector += SCALE_BYTES
    return 2 * spec.num_kv_heads * spec.block_size * vector


def whole_blocks(tensors: Sequence[Tensor]) -> LayerKV:
    """A cache of tensors `[blocks, ...]`, each of which has a block's part in one piece."""
    sizes = [tensor[0].numel() * tensor.element_size() for tensor in tensors]
    moved = map(movable, tensors)
    regions = [KVRegion(one, size, size) for one, size in zip(moved, sizes, strict=True)]
    return LayerKV(tuple(tensors), tuple(regions))
