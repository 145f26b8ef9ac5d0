"""Gated activations, rounded and quantized, and the sum of two tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from trimaran.kernels_cuda.portable import activation
from trimaran.kernels_cuda.portable.tuning import Table
from trimaran.platforms.attention_reference import quantize_vectors
from trimaran.platforms.ops import OPS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 64), (3, 100), (2, 3, 1024), (5, 3000), (0, 64)]
KINDS = ["silu", "gelu", "gelu_tanh"]


def function(kind: str) -> Callable[[Tensor, Table], Tensor]:
    found: Callable[[Tensor, Table], Tensor] = getattr(activation, f"{kind}_mul")
    return found


def close(found: Tensor, expected: Tensor, op: str) -> None:
    tolerance = OPS[op].tolerance[expected.dtype]
    torch.testing.assert_close(
        found, expected, rtol=tolerance.rtol, atol=tolerance.atol, equal_nan=True
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gated(
    kind: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, table: Table
) -> None:
    gate_up = (3 * torch.randn(*shape[:-1], 2 * shape[-1], device=device)).to(dtype)
    op = f"{kind}_mul"
    close(function(kind)(gate_up, table), OPS[op].reference(gate_up), op)


@pytest.mark.parametrize("kind", KINDS)
def test_extremes(kind: str, device: torch.device, table: Table) -> None:
    inf = float("inf")
    gate = torch.tensor([0.0, -0.0, 88.0, -88.0, -200.0, 1e30, -1e30, inf, -inf, float("nan")])
    gate_up = torch.cat((gate, torch.full_like(gate, 0.5))).to(device)[None]
    op = f"{kind}_mul"
    close(function(kind)(gate_up, table), OPS[op].reference(gate_up), op)


def test_the_gate_is_rounded_before_it_is_multiplied(device: torch.device, table: Table) -> None:
    """To the bit, nearly everywhere: a product of what was not rounded differs at every other."""
    gate_up = torch.randn(7, 2000, device=device).half()
    same = activation.silu_mul(gate_up, table) == OPS["silu_mul"].reference(gate_up)
    assert same.float().mean() > 0.99


@pytest.mark.parametrize("size", [300, 5000, 17000])
@pytest.mark.parametrize("kind", KINDS)
def test_int8_codes_are_those_of_the_reference(
    kind: str, size: int, device: torch.device, table: Table
) -> None:
    gate_up = torch.randn(3, 2 * size, device=device)
    gate_up[0, size - 1 :: size] = 9.0  # the largest product stands last
    codes, scales = activation.gated_quantized(gate_up, kind, table, dtype=torch.int8)
    expected, their_scales = quantize_vectors(OPS[f"{kind}_mul"].reference(gate_up))
    torch.testing.assert_close(scales, their_scales, rtol=1e-5, atol=0)
    assert (codes.int() - expected.int()).abs().max() <= 1  # a tie may fall either way
    assert (codes != expected).float().mean() < 0.01


@pytest.mark.parametrize("size", [300, 17000])
def test_float8_codes(size: int, device: torch.device, table: Table) -> None:
    """Those of torch's conversion, but for an ulp in the quotient."""
    dtype = torch.float8_e4m3fn
    gate_up = torch.randn(3, 2 * size, device=device)
    codes, scales = activation.gated_quantized(gate_up, "silu", table, dtype=dtype)
    product = OPS["silu_mul"].reference(gate_up)
    torch.testing.assert_close(scales, product.abs().amax(-1) / 448, rtol=1e-5, atol=0)
    expected = (product / scales[:, None]).to(dtype)
    assert (codes.float() == expected.float()).float().mean() > 0.99


@pytest.mark.parametrize("size", [100, 17000])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_stays_in_its_row(
    bad: float, size: int, device: torch.device, table: Table
) -> None:
    gate_up = torch.randn(3, 2 * size, device=device)
    gate_up[1, size + 17] = bad
    codes, scales = activation.gated_quantized(gate_up, "silu", table, dtype=torch.int8)
    assert scales.isfinite().tolist() == [True, False, True]
    gate_up[1, size + 17] = 0.0
    again, _ = activation.gated_quantized(gate_up, "silu", table, dtype=torch.int8)
    assert codes[::2].equal(again[::2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1,), (5,), (3, 100), (2, 3, 5000)], ids=str)
def test_add(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, table: Table
) -> None:
    a, b = torch.randn(2, *shape, device=device).to(dtype)
    assert activation.add(a, b, table).equal(a + b)
