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
    for ours, theirs in zip(found, add_rms_norm(x, residual, weight, 1e-6), strict=True):
        # The interpreter rounds the sum in bfloat16 towards zero: an ulp of what was added.
        atol = 0.04 if dtype == torch.bfloat16 else OPS["add"].tolerance[dtype].atol
        torch.testing.assert_close(
            ours, theirs, rtol=1.6e-2 if dtype == torch.bfloat16 else 2e-3, atol=atol
        )


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
    """Those of torch's conversion; but the interpreter loses the carry where rounding up reaches
    a power of two (127.9 becomes 64)."""
    x, weight = torch.randn(9, 300, device=device), torch.randn(300, device=device)
    codes, scales, _ = norm.rms_norm_quantized(x, weight, 1e-6, table, dtype=dtype)
    expected = (rms_norm(x, weight, 1e-6) / scales[:, None]).to(dtype)
    same = codes.float() == expected.float()
    assert same.float().mean() > (0.99 if device.type == "cuda" else 0.85)
    carried = expected.float().abs().log2().frac() == 0
    assert (same | carried).float().mean() > 0.99
    assert codes.float().abs().amax(1).eq(torch.finfo(dtype).max).all()  # the whole range is used
