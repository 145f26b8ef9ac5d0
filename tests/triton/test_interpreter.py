"""Triton's interpreter as `helpers.interpreter` mends it, against torch: what numbers of 8 and 16
bits become. On a card the same asks whether the card agrees."""

from __future__ import annotations

from itertools import product

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

BF16 = torch.bfloat16
FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@triton.jit
def _convert(x_ptr, out_ptr, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    tl.store(out_ptr + place, tl.load(x_ptr + place).to(out_ptr.dtype.element_ty))


def converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty_like(x, dtype=dtype)
    _convert[(1,)](x, out, COUNT=len(x))
    return out


def codes(dtype: torch.dtype, device: torch.device) -> Tensor:
    """Every number of a float of 8 or 16 bits."""
    if dtype.itemsize == 1:
        return torch.arange(256, device=device).to(torch.uint8).view(dtype)
    return torch.arange(-(2**15), 2**15, device=device).to(torch.int16).view(dtype)


def between(numbers: Tensor) -> Tensor:
    """fp32 around every place where rounding changes: halfway between neighbours (a tie; also
    below a power of two), and the next fp32 to either side."""
    values = numbers.float()
    values = values[values.isfinite()].unique()
    middle = (values[1:].double() + values[:-1].double()).div(2).float()
    up, down = (middle.nextafter(torch.full_like(middle, end)) for end in (torch.inf, -torch.inf))
    found = torch.cat([values, middle, up, down])
    return torch.cat([found, found[-1:].expand(triton.next_power_of_2(len(found)) - len(found))])


WIDENED = [(BF16, torch.float32), *product(FLOAT8, (torch.float32, torch.float16))]


@pytest.mark.parametrize(("dtype", "wide"), WIDENED, ids=str)
def test_every_number_is_widened(
    dtype: torch.dtype, wide: torch.dtype, device: torch.device
) -> None:
    found = converted(codes(dtype, device), wide)
    torch.testing.assert_close(found, codes(dtype, device).to(wide), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, *FLOAT8], ids=str)
def test_the_nearest_and_of_two_the_even_one(dtype: torch.dtype, device: torch.device) -> None:
    x = between(codes(dtype, device))
    found, expected = converted(x, dtype), x.to(dtype)
    assert found.float().equal(expected.float())


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32], ids=str)
def test_integers_and_bfloat16(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.arange(-128, 128, device=device).to(dtype)
    assert converted(x, BF16).equal(x.to(BF16))
    assert converted(x.to(BF16), dtype).equal(x)


@triton.jit
def _calculate(a_ptr, b_ptr, out_ptr, seen_ptr, COUNT: tl.constexpr):
    place = tl.arange(0, COUNT)
    a, b = tl.load(a_ptr + place), tl.load(b_ptr + place)
    tl.store(out_ptr + place, a + b)
    tl.store(out_ptr + COUNT + place, a - b)
    tl.store(out_ptr + 2 * COUNT + place, a * b)
    tl.store(out_ptr + 3 * COUNT + place, tl.where(a < b, -a, tl.abs(b)))
    tl.store(out_ptr + 4 * COUNT + place, tl.maximum(a, b))
    tl.store(out_ptr + 5 * COUNT + place, tl.minimum(a, b))
    tl.store(seen_ptr + place, a < b)
    tl.store(seen_ptr + COUNT + place, a >= b)
    tl.store(seen_ptr + 2 * COUNT + place, a == b)


def test_bfloat16_is_calculated_with(device: torch.device) -> None:
    """Ties, numbers that carry into the next power of two, zeros and numbers of either sign."""
    a, b = torch.randn(2, 4096, device=device).mul_(4).to(BF16)
    a[:64], b[:64] = 1 + torch.arange(64, device=device) / 128, 2.0**-8
    a[64:128], b[64:128] = 255, torch.arange(64, device=device) / 32
    a[128:132], b[128:132] = a.new_tensor([0, -0.0, 0, 1]), a.new_tensor([-0.0, 0, 1, 1])
    out = torch.empty(6, 4096, dtype=BF16, device=device)
    seen = torch.empty(3, 4096, dtype=torch.bool, device=device)
    _calculate[(1,)](a, b, out, seen, COUNT=4096)
    chosen = torch.where(a < b, -a, b.abs())
    expected = torch.stack([a + b, a - b, a * b, chosen, a.maximum(b), a.minimum(b)])
    for ours, theirs in zip(out, expected, strict=True):
        assert ours.equal(theirs)
    assert seen.equal(torch.stack([a < b, a >= b, a == b]))


@triton.jit
def _reduce(x_ptr, sum_ptr, max_ptr, COUNT: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, COUNT)[:, None] * COUNT + tl.arange(0, COUNT)[None, :])
    tl.store(sum_ptr + tl.arange(0, COUNT), tl.sum(x.to(tl.float32), axis=1))
    tl.store(max_ptr + tl.arange(0, COUNT), tl.max(x, axis=1))


def test_bfloat16_is_reduced(device: torch.device) -> None:
    x = torch.randn(32, 32, device=device).to(BF16)
    sums, most = torch.empty(2, 32, device=device)
    _reduce[(1,)](x, sums, most, COUNT=32)
    torch.testing.assert_close(sums, x.float().sum(1))
    assert most.equal(x.float().amax(1))


@triton.jit
def _dot(a_ptr, b_ptr, out_ptr, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    product = tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at), out_dtype=tl.float32)
    tl.store(out_ptr + at, product)


@pytest.mark.parametrize("dtype", [BF16, torch.float16, *FLOAT8], ids=str)
def test_products_are_summed_in_fp32(dtype: torch.dtype, device: torch.device) -> None:
    if dtype in FLOAT8 and device.type == "cuda":
        pytest.skip("what cards multiply in 8-bit floats is in test_gemm.py, by their tables")
    a, b = torch.randn(2, 32, 32, device=device).to(dtype)
    out = torch.empty(32, 32, device=device)
    _dot[(1,)](a, b, out, SIZE=32)
    torch.testing.assert_close(out, a.float() @ b.float(), rtol=1e-6, atol=1e-5)
