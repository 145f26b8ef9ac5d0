"""RMSNorm, alone, after an addition and quantized."""

from __future__ import annotations

import pytest
import torch

from trimaran.kernels_cuda.portable import norm
from trimaran.kernels_cuda.portable.tuning import Table
from trimaran.platforms.attention_reference import quantize_vectors
from trimaran.platforms.ops import OPS, add_rms_norm, rms_norm

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 64), (3, 100), (5, 7, 128), (2, 1000), (33, 5120)]


def close(found: torch.Tensor, expected: torch.Tensor, op: str = "rms_norm") -> None:
    tolerance = OPS[op].tolerance[expected.dtype]
    torch.testing.assert_close(
        found, expected, rtol=tolerance.rtol, atol=tolerance.atol, equal_nan=True
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norms(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, table: Table
) -> None:
    x, residual = torch.randn(2, *shape, device=device).to(dtype)
    weight = torch.randn(shape[-1], device=device).to(dtype)
    close(norm.rms_norm(x, weight, 1e-6, table), rms_norm(x, weight, 1e-6))
    found = norm.add_rms_norm(x, residual, weight, 1e-6, table)
    expected = add_rms_norm(x, residual, weight, 1e-6)
    close(found[0], expected[0])
    assert found[1].equal(expected[1])


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_the_norm_is_rounded_before_it_is_multiplied(
    dtype: torch.dtype, device: torch.device, table: Table
) -> None:
    """To the bit, nearly everywhere: a product of what was not rounded differs at every third."""
    x, weight = torch.randn(7, 1000, device=device).to(dtype), torch.randn(1000, device=device)
    weight = weight.to(dtype)
    same = norm.rms_norm(x, weight, 1e-6, table) == rms_norm(x, weight, 1e-6)
    assert same.float().mean() > 0.99


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_the_sum_is_rounded_before_the_norm(
    dtype: torch.dtype, device: torch.device, table: Table
) -> None:
    x, residual = torch.randn(2, 7, 1000, device=device).to(dtype)
    weight = torch.ones(1000, device=device, dtype=dtype)
    found, total = norm.add_rms_norm(x, residual, weight, 1e-6, table)
    same = found == rms_norm(total, weight, 1e-6)
    assert same.float().mean() > 0.99


def test_rows_of_next_to_nothing(device: torch.device, table: Table) -> None:
    """Where the mean square is no more than epsilon, or 0."""
    x = (
        torch.randn(4, 100, device=device)
        * torch.tensor([0, 1e-4, 1e-3, 1], device=device)[:, None]
    )
    weight = torch.randn(100, device=device)
    close(norm.rms_norm(x, weight, 1e-6, table), rms_norm(x, weight, 1e-6))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_in_its_row(bad: float, device: torch.device, table: Table) -> None:
    x, weight = torch.randn(3, 100, device=device), torch.randn(100, device=device)
    x[1, 17] = bad
    close(norm.rms_norm(x, weight, 1e-6, table), rms_norm(x, weight, 1e-6))
    codes, scales, _ = norm.rms_norm_quantized(x, weight, 1e-6, table, dtype=torch.int8)
    assert scales.isfinite().tolist() == [True, False, True]


def test_int8_codes_are_those_of_the_reference(device: torch.device, table: Table) -> None:
    x, residual = torch.randn(2, 9, 300, device=device)
    weight = torch.randn(300, device=device)
    found = norm.rms_norm_quantized(x, weight, 1e-6, table, dtype=torch.int8, residual=residual)
    normed, total = add_rms_norm(x, residual, weight, 1e-6)
    codes, scales = quantize_vectors(normed)
    assert found[2] is not None
    close(found[2], total)
    close(found[1], scales)
    assert (found[0].int() - codes.int()).abs().max() <= 1  # a tie may fall either way
    assert (found[0] != codes).float().mean() < 0.01


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8_codes(dtype: torch.dtype, device: torch.device, table: Table) -> None:
    """Those of torch's conversion, but for an ulp in the quotient."""
    x, weight = torch.randn(9, 300, device=device), torch.randn(300, device=device)
    codes, scales, _ = norm.rms_norm_quantized(x, weight, 1e-6, table, dtype=dtype)
    expected = (rms_norm(x, weight, 1e-6) / scales[:, None]).to(dtype)
    assert (codes.float() == expected.float()).float().mean() > 0.99
    assert codes.float().abs().amax(1).eq(torch.finfo(dtype).max).all()  # the whole range is used
