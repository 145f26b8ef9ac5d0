"""int4 weights by activations that are not rounded: against the dense product of what the codes
stand for, and bit for bit against itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from helpers.native import needs_native
from torch import Tensor

from trimaran.core.quantization.codes import dequantize
from trimaran.platforms.cpu import CpuPlatform
from trimaran.platforms.interface import INT4, W4A16, OpSignature, PackedWeight
from trimaran.platforms.ops import activation_rounding

pytestmark = [needs_native, pytest.mark.usefixtures("seed")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = [*range(1, 15), 24, 25, 150]
WEIGHTS = [
    pytest.param(128, (64, 256), id="groups of 128"),
    pytest.param(32, (33, 96), id="edges"),
    pytest.param(64, (1, 64), id="one"),
    pytest.param(2080, (129, 4160), id="wide groups"),
]


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    (impl,) = (one for one in CpuPlatform().ops()["linear"] if one.name == "native")
    made: Tensor = impl(x, weight, bias)
    return made


def random_weight(group: int, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Canonical tensors with every code and zero, and scales of several magnitudes."""
    groups = (shape[0], shape[1] // group)
    return {
        "codes": torch.randint(0, 16, shape, dtype=torch.uint8),
        "scales": torch.exp2(torch.randn(groups) - 5),
        "zeros": torch.randint(0, 16, groups, dtype=torch.uint8),
    }


def packed(weight: dict[str, Tensor], format: str = W4A16) -> PackedWeight:
    out_features, in_features = weight["codes"].shape
    return CpuPlatform().weight_packers()[format].pack(weight, (out_features, in_features))


def summed(x: Tensor, plain: Tensor) -> Tensor:
    """What sums in fp32 of the products of |x| and at most 16 scales may be off by."""
    most = x.double().abs() @ plain.double().abs().T
    return (x.shape[1] + 8) * torch.finfo(torch.float32).eps * most


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "shape"), WEIGHTS)
def test_equals_the_dense_product(group: int, shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Far within what rounding the activations would make of it."""
    weight = random_weight(group, shape)
    made, plain = packed(weight), dequantize(weight)
    bias = torch.randn(shape[0]).to(dtype)
    for rows in ROWS:
        x = torch.randn(rows, shape[1]).to(dtype)
        for summand in (None, bias):
            y = linear(x, made, summand).double()
            exact = x.double() @ plain.double().T + (0 if summand is None else summand.double())
            stored = 0 if dtype == torch.float32 else exact.abs() * torch.finfo(dtype).eps / 2
            bound = summed(x, plain) + stored * 1.01
            assert ((y - exact).abs() <= bound).all(), rows
            assert bound.mean() < activation_rounding(x, plain).mean(), rows


@pytest.mark.parametrize(("group", "shape"), WEIGHTS)
def test_reads_what_w4a8_reads(group: int, shape: tuple[int, int]) -> None:
    """Codes, scales and zeros lie the same; only the format says how they are multiplied."""
    weight = random_weight(group, shape)
    rounded, wide = packed(weight, INT4), packed(weight)
    assert rounded.format != wide.format and rounded.extra_bytes == wide.extra_bytes
    for a, b in zip(rounded.tensors, wide.tensors, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("rows", [1, 5, 30])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_comes_out_where_it_does_of_the_dense_product(
    value: float, rows: int
) -> None:
    """An infinity has the sign of the weight, and is NaN where that is 0."""
    weight = random_weight(32, (64, 96))
    weight["codes"][:9, 40] = weight["zeros"][:9, 1]
    weight["scales"][:5, 1] = 0
    made = packed(weight)
    x = torch.randn(rows, 96)
    before = linear(x, made)
    x[-1, 40] = value
    found, expected = linear(x, made), F.linear(x, dequantize(weight))
    assert torch.equal(found[:-1], before[:-1])
    kinds = torch.isnan, torch.isposinf, torch.isneginf
    assert all(torch.equal(kind(found), kind(expected)) for kind in kinds)


@pytest.mark.parametrize("value", [3e38, -2000.0, 1e-37, 2**-140, 0.0])
def test_extreme_tokens(value: float) -> None:
    weight = random_weight(128, (64, 256))
    made, plain = packed(weight), dequantize(weight)
    for rows in (3, 30):
        x = torch.randn(rows, 256)
        x[1] *= 1e-37
        x[2, 7] = value
        y, exact = linear(x, made).double(), x.double() @ plain.double().T
        fits = exact.abs() < torch.finfo(torch.float32).max
        assert ((y - exact).abs() <= summed(x, plain) + 1e-44)[fits].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("group", "shape"), WEIGHTS)
def test_a_token_does_not_depend_on_its_batch_nor_on_threads(
    group: int,
    shape: tuple[int, int],
    dtype: torch.dtype,
    threads: Callable[[int], None],
) -> None:
    made = packed(random_weight(group, shape))
    x = torch.randn(300, shape[1]).to(dtype)
    together = linear(x, made)
    for count in (1, 2, 3):
        threads(count)
        assert torch.equal(linear(x, made), together)
        for rows in (1, 2, 3, 7, 11, 13, 23):
            assert torch.equal(linear(x[40 : 40 + rows], made), together[40 : 40 + rows])


@pytest.mark.parametrize(("group", "shape"), WEIGHTS)
def test_reads_columns_of_wider_rows(group: int, shape: tuple[int, int]) -> None:
    made = packed(random_weight(group, shape))
    wide = torch.randn(6, shape[1] + 9)
    x = wide[:, 4 : 4 + shape[1]]
    assert torch.equal(linear(x, made), linear(x.contiguous(), made))


def test_the_platform_offers_the_format() -> None:
    platform = CpuPlatform()
    assert W4A16 in platform.capabilities().weight_formats
    (native,) = (one for one in platform.ops()["linear"] if one.name == "native")
    sizes = {"in_features": 128, "out_features": 64}
    assert native.supports(OpSignature("linear", torch.bfloat16, sizes, W4A16))
