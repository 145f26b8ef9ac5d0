"""The KV cache of one layer, as the kernels of attention and of the cache write have it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class PagedCache(NamedTuple):
    """`keys` and `values` `[blocks, kv_heads, block_size, head_dim]` with the same strides, all but
    the first as if contiguous. `key_scales`, `value_scales`: fp32 `[blocks, kv_heads, block_size]`,
    of each vector (int8 alone). `key_scale`, `value_scale`: of the whole (float8 alone). A value is
    code * scale."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    key_scale: float = 1.0
    value_scale: float = 1.0
