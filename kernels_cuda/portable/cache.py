"""Rotary embedding and the write into the paged KV cache, apart or in one launch.

Keys and values are kept apart, each `[blocks, kv_heads, block_size, head_dim]` (a block's stride is
free, what is within a block is dense). `slots` `[tokens]`, int32 or int64: block * block_size +
offset; a negative one is not written. By the dtype of the cache a value is kept

- in a float as it is, rounded;
- in int8 with a scale for each vector, fp32 `[blocks, kv_heads, block_size]`: max|x| / 127, NaN for
  a vector that is not finite;
- in a float8 divided by a scale, one for all keys and one for all values, and at most its largest
  number; NaN stays NaN.

Queries, keys and values are `[tokens, heads, head_dim]` with dense heads and any stride between
tokens, so that they may be columns of one matrix.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .paged import PagedCache
from .quantize import LIMITS, encode
from .tuning import Table


class Rotation(NamedTuple):
    """`cos_sin`: fp32 `[max_position, rotary_dim]`, first the cosines of the rotary_dim / 2 angles,
    then their sines; `positions`: `[tokens]` or `[axes, tokens]`, whose first row is used."""

    positions: Tensor
    cos_sin: Tensor


class HeadNorms(NamedTuple):
    """The RMS norm of each query's and each key's head before rotation: weights `[head_dim]`."""

    query_weight: Tensor
    key_weight: Tensor
    eps: float


@triton.jit
def _keep(
    x,
    cache_ptr,
    scales_ptr,
    scale,
    slot,
    head,
    inside,
    block_stride,
    scales_stride,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LIMIT: tl.constexpr,
):
    """Store fp32 vectors `[heads, BLOCK]`, 0 past DIM, at a slot. `head` `[heads]`, `inside` like
    x. LIMIT: the largest code, 0 where there are none."""
    dtype: tl.constexpr = cache_ptr.dtype.element_ty
    block, offset = (slot // BLOCK_SIZE).to(tl.int64), slot % BLOCK_SIZE
    column = tl.arange(0, BLOCK)[None, :]
    place = head * BLOCK_SIZE + offset
    at = block * block_stride + place[:, None] * DIM + column
    if scales_ptr is not None:
        # Correctly rounded quotients: the codes are the reference's.
        scales = tl.div_rn(tl.max(tl.abs(x), axis=1), tl.full([x.shape[0]], LIMIT, tl.float32))
        divisor = tl.where(scales > 0.0, scales, 1.0)
        codes = tl.div_rn(x, tl.broadcast_to(divisor[:, None], x.shape))
        codes = tl.where(codes == codes, codes, 0.0)  # NaN is no code
        tl.store(cache_ptr + at, encode(codes, LIMIT, dtype), mask=inside)
        # max() passes over NaN; the sum of x * 0 does not.
        scales += tl.sum(x * 0.0, axis=1)
        tl.store(scales_ptr + block * scales_stride + place, scales, mask=tl.max(inside, 1) > 0)
    else:
        if LIMIT > 0:
            x = x / scale
            x = tl.clamp(x, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        tl.store(cache_ptr + at, x.to(dtype), mask=inside)


@triton.jit
def _write(
    key_ptr,
    value_ptr,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    slots_ptr,
    key_stride,
    value_stride,
    keys_stride,
    values_stride,
    key_scales_stride,
    value_scales_stride,
    key_scale,
    value_scale,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LIMIT: tl.constexpr,
    HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots_ptr + token)
    if slot < 0:
        return
    head, column = tl.program_id(1) * HEADS + tl.arange(0, HEADS), tl.arange(0, BLOCK)
    inside = (head < KV_HEADS)[:, None] & (column < DIM)[None, :]
    at = head[:, None] * DIM + column[None, :]
    key = tl.load(key_ptr + token * key_stride + at, mask=inside, other=0.0).to(tl.float32)
    value = tl.load(value_ptr + token * value_stride + at, mask=inside, other=0.0).to(tl.float32)
    _keep(
        key, keys_ptr, key_scales_ptr, key_scale, slot, head, inside,
        keys_stride, key_scales_stride, DIM, BLOCK, BLOCK_SIZE, LIMIT,
    )  # fmt: skip
    _keep(
        value, values_ptr, value_scales_ptr, value_scale, slot, head, inside,
        values_stride, value_scales_stride, DIM, BLOCK, BLOCK_SIZE, LIMIT,
    )  # fmt: skip


@triton.jit
def _rotated(
    x_ptr,
    weight_ptr,
    cos_sin_ptr,
    position,
    head,
    inside,
    eps,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROTARY: tl.constexpr,
):
    """Heads `[heads, BLOCK]` of one token, normed where there is a weight, and rotated; fp32, but
    rounded to the dtype; 0 outside. `x_ptr`: the token's first head.

    Each channel's partner is loaded a second time (from the first-level cache): lanes need not
    trade registers then, and channels without one are no special case.
    """
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    half: tl.constexpr = ROTARY // 2
    column = tl.arange(0, BLOCK)
    turned = column < ROTARY
    partner = tl.where(column < half, column + half, tl.where(turned, column - half, column))
    at = head[:, None] * DIM
    x = tl.load(x_ptr + at + column[None, :], mask=inside, other=0.0).to(tl.float32)
    other = tl.load(x_ptr + at + partner[None, :], mask=inside, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        scale = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)[:, None]
        weight = tl.load(weight_ptr + column, mask=column < DIM, other=0.0).to(tl.float32)
        their = tl.load(weight_ptr + partner, mask=column < DIM, other=0.0).to(tl.float32)
        x = (x * scale).to(dtype).to(tl.float32) * weight[None, :]
        x = x.to(dtype).to(tl.float32)
        other = (other * scale).to(dtype).to(tl.float32) * their[None, :]
        other = other.to(dtype).to(tl.float32)
    angle = cos_sin_ptr + position * ROTARY + column % half
    cos = tl.load(angle, mask=turned, other=1.0).to(dtype).to(tl.float32)
    sin = tl.load(angle + half, mask=turned, other=0.0).to(dtype).to(tl.float32)
    sin = tl.where(column < half, -sin, sin)
    y = tl.where(turned[None, :], x * cos[None, :] + other * sin[None, :], x)
    return tl.where(inside, y, 0.0).to(dtype)


@triton.jit
def _rope(
    query_ptr,
    key_ptr,
    value_ptr,
    query_out_ptr,
    key_out_ptr,
    query_weight_ptr,
    key_weight_ptr,
    positions_ptr,
    cos_sin_ptr,
    eps,
    query_stride,
    key_stride,
    value_stride,
    keys_ptr,
    values_ptr,
    key_scales_ptr,
    value_scales_ptr,
    slots_ptr,
    keys_stride,
    values_stride,
    key_scales_stride,
    value_scales_stride,
    key_scale,
    value_scale,
    QUERY_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LIMIT: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Some heads of one token: of its query, or of its key and value. The rotated key goes to
    `key_out_ptr` or, with the value, to the cache (`keys_ptr` is not None)."""
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    parts: tl.constexpr = (QUERY_HEADS + HEADS - 1) // HEADS
    position = tl.load(positions_ptr + token).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    if part < parts:
        head = part * HEADS + tl.arange(0, HEADS)
        inside = (head < QUERY_HEADS)[:, None] & (column < DIM)
        query = _rotated(
            query_ptr + token * query_stride, query_weight_ptr, cos_sin_ptr, position,
            head, inside, eps, DIM, BLOCK, ROTARY,
        )  # fmt: skip
        at = (token * QUERY_HEADS + head[:, None]) * DIM + column
        tl.store(query_out_ptr + at, query, mask=inside)
    else:
        head = (part - parts) * HEADS + tl.arange(0, HEADS)
        inside = (head < KV_HEADS)[:, None] & (column < DIM)
        key = _rotated(
            key_ptr + token * key_stride, key_weight_ptr, cos_sin_ptr, position,
            head, inside, eps, DIM, BLOCK, ROTARY,
        )  # fmt: skip
        if key_out_ptr is not None:
            tl.store(
                key_out_ptr + (token * KV_HEADS + head[:, None]) * DIM + column, key, mask=inside
            )
        if keys_ptr is not None:
            slot = tl.load(slots_ptr + token)
            if slot >= 0:
                value = tl.load(
                    value_ptr + token * value_stride + head[:, None] * DIM + column,
                    mask=inside,
                    other=0.0,
                )
                _keep(
                    key.to(tl.float32), keys_ptr, key_scales_ptr, key_scale, slot, head, inside,
                    keys_stride, key_scales_stride, DIM, BLOCK, BLOCK_SIZE, LIMIT,
                )  # fmt: skip
                _keep(
                    value.to(tl.float32), values_ptr, value_scales_ptr, value_scale, slot, head,
                    inside, values_stride, value_scales_stride, DIM, BLOCK, BLOCK_SIZE, LIMIT,
                )  # fmt: skip


def write(key: Tensor, value: Tensor, cache: PagedCache, slots: Tensor, table: Table) -> None:
    """key, value `[tokens, kv_heads, head_dim]` into the cache at `slots`."""
    tokens, kv_heads, dim = key.shape
    values = _values("cache_write", table, tokens, kv_heads, dim)
    if tokens:
        _write[(tokens, triton.cdiv(kv_heads, values["HEADS"]))](
            _dense_heads(key),
            _dense_heads(value),
            slots_ptr=slots,
            key_stride=key.stride(0),
            value_stride=value.stride(0),
            KV_HEADS=kv_heads,
            DIM=dim,
            BLOCK=triton.next_power_of_2(dim),
            **_of_cache(cache),
            **values,
        )


def rope(
    query: Tensor, key: Tensor, positions: Tensor, cos_sin: Tensor, table: Table
) -> tuple[Tensor, Tensor]:
    """Rotary embedding (Su et al. 2021, eq. 34), its halves apart ("rotate half"); channels past
    rotary_dim pass unchanged -> new tensors, dense. Cosine and sine are rounded to the dtype, of
    the two products the sum alone."""
    out = query.new_empty(query.shape), key.new_empty(key.shape)
    _launch(query, key, None, *out, Rotation(positions, cos_sin), None, None, None, table)
    return out


def rope_write(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotation: Rotation,
    cache: PagedCache,
    slots: Tensor,
    table: Table,
    norms: HeadNorms | None = None,
) -> Tensor:
    """query `[tokens, heads, head_dim]`, key and value `[tokens, kv_heads, head_dim]`: the norms of
    their heads (Qwen3; None: there are none), `rope`, and `write` of key and value, in one launch
    -> the rotated query, a new tensor, dense. Nothing is written in place: other programs and
    lanes still read the old."""
    out = query.new_empty(query.shape)
    _launch(query, key, value, out, None, rotation, norms, cache, slots, table)
    return out


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    query_out: Tensor,
    key_out: Tensor | None,
    rotation: Rotation,
    norms: HeadNorms | None,
    cache: PagedCache | None,
    slots: Tensor | None,
    table: Table,
) -> None:
    tokens, heads, dim = query.shape
    kv_heads = key.shape[1]
    positions, cos_sin = rotation
    values = _values("rope", table, tokens, heads, dim)
    parts = triton.cdiv(heads, values["HEADS"]) + triton.cdiv(kv_heads, values["HEADS"])
    if not tokens:
        return
    _rope[(tokens, parts)](
        _dense_heads(query),
        _dense_heads(key),
        None if value is None else _dense_heads(value),
        query_out,
        key_out,
        norms and norms.query_weight,
        norms and norms.key_weight,
        positions[0] if positions.dim() == 2 else positions,
        cos_sin,
        norms.eps if norms else 0.0,
        query.stride(0),
        key.stride(0),
        0 if value is None else value.stride(0),
        slots_ptr=slots,
        QUERY_HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        BLOCK=triton.next_power_of_2(dim),
        ROTARY=cos_sin.shape[1],
        **_of_cache(cache),
        **values,
    )


def _of_cache(cache: PagedCache | None) -> dict[str, Any]:
    """The kernels' arguments that tell where a cache is and what it keeps."""
    if cache is None:
        cache = PagedCache(None, None)  # type: ignore[arg-type]
    strides = [0 if tensor is None else tensor.stride(0) for tensor in cache[:4]]
    codes = None if cache.keys is None else cache.keys.dtype
    return {
        "keys_ptr": cache.keys,
        "values_ptr": cache.values,
        "key_scales_ptr": cache.key_scales,
        "value_scales_ptr": cache.value_scales,
        "keys_stride": strides[0],
        "values_stride": strides[1],
        "key_scales_stride": strides[2],
        "value_scales_stride": strides[3],
        "key_scale": cache.key_scale,
        "value_scale": cache.value_scale,
        "BLOCK_SIZE": 1 if cache.keys is None else cache.keys.shape[2],
        "LIMIT": LIMITS.get(codes, 0.0),
    }


def _dense_heads(x: Tensor) -> Tensor:
    if x.stride(2) != 1 or x.stride(1) != x.shape[2]:
        raise ValueError(f"heads of strides {x.stride()}; those of one token have to be dense")
    return x


def _values(kernel: str, table: Table, tokens: int, heads: int, dim: int) -> dict[str, Any]:
    """The table's, with no more heads a program than there are."""
    values = table.pick(kernel, dim=dim, tokens=tokens)
    return {**values, "HEADS": min(values["HEADS"], triton.next_power_of_2(heads))}
