"""Rotary embedding, the norm of heads, and the write into the paged cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimaran.kernels_cuda.portable import cache
from trimaran.kernels_cuda.portable.cache import HeadNorms, PagedCache, Rotation
from trimaran.kernels_cuda.portable.tuning import Table
from trimaran.platforms.attention_reference import quantize_vectors
from trimaran.platforms.ops import OPS, rms_norm, rope

BLOCKS, SIZE = 7, 16
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]
# (heads, kv_heads, head_dim, rotary_dim)
SHAPES = [(1, 1, 64, 64), (6, 2, 128, 128), (5, 5, 80, 80), (9, 3, 96, 32), (32, 4, 16, 8)]


def angles(device: torch.device, rotary: int, longest: int = 100) -> Tensor:
    angle = torch.arange(longest)[:, None] / 100 ** (torch.arange(rotary // 2) / rotary * 2)
    return torch.cat((angle.cos(), angle.sin()), dim=1).to(device)


def qkv(
    device: torch.device, tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Views of one matrix."""
    whole = torch.randn(tokens, heads + 2 * kv_heads, dim, device=device).to(dtype)
    return whole.split((heads, kv_heads, kv_heads), dim=1)


def empty(device: torch.device, kv_heads: int, dim: int, dtype: torch.dtype) -> PagedCache:
    """Of a value that no test writes; a block of keys and one of values alternate."""
    whole = torch.full((BLOCKS, 2, kv_heads, SIZE, dim), 3, device=device).to(dtype)
    scales = torch.full((BLOCKS, 2, kv_heads, SIZE), 3.0, device=device).unbind(1)
    return PagedCache(*whole.unbind(1), *(scales if dtype == torch.int8 else ()))


def slots_of(device: torch.device, tokens: int) -> Tensor:
    return torch.randperm(BLOCKS * SIZE, device=device)[:tokens]


def written(found: PagedCache, slots: Tensor) -> list[Tensor]:
    """What each tensor holds at the slots, `[tokens, kv_heads, ...]`; all else is untouched."""
    parts = []
    for tensor in found[:4]:
        if tensor is not None:
            by_slot = tensor.transpose(1, 2).flatten(0, 1)  # [slots, kv_heads, ...]
            parts.append(by_slot[slots])
            rest = torch.ones(BLOCKS * SIZE, dtype=torch.bool, device=slots.device)
            rest[slots[slots >= 0]] = False
            assert by_slot[rest].float().eq(3).all()
    return parts


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_rope(
    tokens: int, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, table: Table
) -> None:
    heads, kv_heads, dim, rotary = shape
    query, key, _ = qkv(device, tokens, heads, kv_heads, dim, dtype)
    positions = torch.randint(0, 100, (1, tokens), device=device)
    cos_sin = angles(device, rotary)
    found = cache.rope(query, key, positions, cos_sin, table)
    tolerance = OPS["rope"].tolerance[dtype]
    for ours, theirs in zip(found, rope(query, key, positions, cos_sin), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance.rtol, atol=tolerance.atol)
        assert ours[..., rotary:].equal(theirs[..., rotary:])


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.int8], ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_write(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    index: torch.dtype,
    device: torch.device,
    table: Table,
) -> None:
    _, kv_heads, dim, _ = shape
    model = torch.float32 if dtype == torch.int8 else dtype
    _, key, value = qkv(device, 9, 2, kv_heads, dim, model)
    slots, found = slots_of(device, 9), empty(device, kv_heads, dim, dtype)
    cache.write(key, value, found, slots.to(index), table)
    if dtype == torch.int8:
        (keys, key_scales), (values, value_scales) = map(quantize_vectors, (key, value))
        expected = [keys, values, key_scales, value_scales]
    else:
        expected = [key, value]
    for ours, theirs in zip(written(found, slots), expected, strict=True):
        assert ours.equal(theirs)


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_write_float8(dtype: torch.dtype, device: torch.device, table: Table) -> None:
    """Torch's codes; beyond the largest number that number; NaN stays."""
    _, key, value = (part.clone() for part in qkv(device, 9, 1, 3, 96, torch.float32))
    key[3, 1, 5], key[4, 1, 5], key[5, 1, 5] = float("nan"), float("inf"), -60000.0
    slots, found = slots_of(device, 9), empty(device, 3, 96, dtype)
    found = found._replace(key_scale=0.25, value_scale=2.0)
    cache.write(key, value, found, slots, table)
    most = torch.finfo(dtype).max
    exact = ((key / 0.25).clamp(-most, most), value / 2)
    for ours, theirs in zip(written(found, slots), exact, strict=True):
        torch.testing.assert_close(
            ours.float(), theirs.to(dtype).float(), rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_rope_write_float8(dtype: torch.dtype, device: torch.device, table: Table) -> None:
    """Keys after the rotation, which here turns nothing, and values, each by their own scale."""
    query, key, value = qkv(device, 5, 2, 2, 64, torch.float32)
    rotation = Rotation(torch.zeros(5, dtype=torch.int64, device=device), angles(device, 64))
    slots, found = slots_of(device, 5), empty(device, 2, 64, dtype)
    found = found._replace(key_scale=0.25, value_scale=2.0)
    cache.rope_write(query, key, value, rotation, found, slots, table)
    exact = ((key / 0.25).to(dtype), (value / 2).to(dtype))
    for ours, theirs in zip(written(found, slots), exact, strict=True):
        assert ours.float().equal(theirs.float())


def test_heads_of_zeros(device: torch.device, table: Table) -> None:
    """Their norm is the epsilon's; what is nearly zero is not blown up."""
    query, key, value = (part.clone() for part in qkv(device, 3, 2, 2, 64, torch.float32))
    query[1], key[1], key[2] = 0.0, 0.0, key[2] * 1e-4
    rotation = Rotation(torch.arange(3, device=device)[None], angles(device, 64))
    weights = torch.randn(2, 64, device=device)
    slots, found = slots_of(device, 3), empty(device, 2, 64, torch.float32)
    norms = HeadNorms(*weights, 1e-6)
    turned = cache.rope_write(query, key, value, rotation, found, slots, table, norms)
    query, key = rms_norm(query, weights[0], 1e-6), rms_norm(key, weights[1], 1e-6)
    expected = rope(query, key, *rotation)
    torch.testing.assert_close(turned, expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(written(found, slots)[0], expected[1], rtol=1e-5, atol=1e-5)


def test_negative_slots_are_not_written(device: torch.device, table: Table) -> None:
    query, key, value = qkv(device, 5, 2, 2, 64, torch.float32)
    slots = torch.tensor([5, -1, 17, -9, 100], device=device)
    rotation = Rotation(torch.zeros(5, dtype=torch.int64, device=device), angles(device, 64))
    for fused in (False, True):
        found = empty(device, 2, 64, torch.float32)
        if fused:
            cache.rope_write(query, key, value, rotation, found, slots, table)
        else:
            cache.write(key, value, found, slots, table)
        assert written(found, slots)[1][::2].equal(value[::2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_has_a_scale_of_nan(
    bad: float, device: torch.device, table: Table
) -> None:
    _, key, value = (part.clone() for part in qkv(device, 3, 1, 2, 80, torch.float32))
    key[1, 1, 79] = bad
    value[2] = 0.0
    slots, found = slots_of(device, 3), empty(device, 2, 80, torch.int8)
    cache.write(key, value, found, slots, table)
    keys, values, key_scales, value_scales = written(found, slots)
    assert key_scales.isfinite().flatten().tolist() == [True, True, True, False, True, True]
    assert value_scales[2].eq(0).all() and values[2].eq(0).all()
    assert keys[0].equal(quantize_vectors(key)[0][0])


@pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
@pytest.mark.parametrize("kept", [None, torch.int8], ids=["as it is", "int8"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rope_write(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    kept: torch.dtype | None,
    normed: bool,
    device: torch.device,
    table: Table,
) -> None:
    heads, kv_heads, dim, rotary = shape
    query, key, value = qkv(device, 5, heads, kv_heads, dim, dtype)
    before = key.clone()
    rotation = Rotation(torch.randint(0, 100, (3, 5), device=device), angles(device, rotary))
    weights = torch.randn(2, dim, device=device).to(dtype)
    norms = HeadNorms(*weights, 1e-6) if normed else None
    slots, found = slots_of(device, 5), empty(device, kv_heads, dim, kept or dtype)
    turned = cache.rope_write(query, key, value, rotation, found, slots, table, norms)
    assert key.equal(before)
    if normed:
        query, key = rms_norm(query, weights[0], 1e-6), rms_norm(key, weights[1], 1e-6)
    expected = rope(query, key, *rotation)
    tolerance = OPS["rope"].tolerance[dtype]._asdict()
    if normed and dtype != torch.float32:  # the norm may round one way or the other
        tolerance = {name: 2 * value for name, value in tolerance.items()}
    torch.testing.assert_close(turned, expected[0], **tolerance)
    parts = written(found, slots)
    if kept is None:
        torch.testing.assert_close(parts[0], expected[1], **tolerance)
        assert parts[1].equal(value)
    else:
        assert parts[1].equal(quantize_vectors(value)[0])
        assert parts[3].equal(quantize_vectors(value)[1])
        step = parts[2].amax()
        torch.testing.assert_close(
            parts[0] * parts[2][..., None], expected[1].float(), rtol=0.04, atol=float(step) + 0.02
        )
