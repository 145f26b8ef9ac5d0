"""Linear layers with int8 and int4 weights by the native kernels, against the same arithmetic in
fp64 and against the dense product of what the codes stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.native import needs_native
from torch import Tensor

from trimaran.core.quantization.codes import dequantize
from trimaran.core.quantization.scheme import WeightScheme
from trimaran.platforms.cpu import CpuPlatform
from trimaran.platforms.cpu_quantized import MOST_INPUTS
from trimaran.platforms.interface import OpImpl, OpSignature, PackedWeight
from trimaran.platforms.ops import activation_rounding

pytestmark = [needs_native, pytest.mark.usefixtures("seed")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = [*range(1, 15), 24, 25, 70]
WEIGHTS = [
    pytest.param(WeightScheme("int8"), (64, 128), id="int8"),
    pytest.param(WeightScheme("int8"), (33, 7), id="int8-edges"),
    pytest.param(WeightScheme("int8"), (1, 1), id="int8-one"),
    pytest.param(WeightScheme("int8"), (129, 4100), id="int8-deep"),
    pytest.param(WeightScheme("int4", 128), (64, 256), id="int4"),
    pytest.param(WeightScheme("int4", 32), (33, 96), id="int4-edges"),
    pytest.param(WeightScheme("int4", 64), (1, 64), id="int4-one"),
    pytest.param(WeightScheme("int4", 2080), (129, 4160), id="int4-wide-groups"),
]
AT_LOAD = WEIGHTS[:-1]
BOTH = [WEIGHTS[0], WEIGHTS[4]]


def native_linear() -> OpImpl:
    (impl,) = (one for one in CpuPlatform().ops()["linear"] if one.name == "native")
    return impl


def linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    made: Tensor = native_linear()(x, weight, bias)
    return made


def random_weight(scheme: WeightScheme, shape: tuple[int, int]) -> dict[str, Tensor]:
    """Canonical tensors with every code and zero, and scales of several magnitudes."""
    kinds = scheme.tensors(shape)
    low, high = (-127, 128) if scheme.format == "int8" else (0, 16)
    weight = {"codes": torch.randint(low, high, shape, dtype=kinds["codes"].dtype)}
    weight["scales"] = torch.exp2(torch.randn(kinds["scales"].shape) - 5)
    if "zeros" in kinds:
        weight["zeros"] = torch.randint(0, 16, kinds["zeros"].shape, dtype=torch.uint8)
    return weight


def packed(scheme: WeightScheme, weight: dict[str, Tensor]) -> PackedWeight:
    out_features, in_features = weight["codes"].shape
    return CpuPlatform().weight_packers()[scheme.format].pack(weight, (out_features, in_features))


def tokens_in_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes in fp64, and scales `[tokens, 1]`."""
    scales = x.float().abs().amax(-1, keepdim=True) / 127
    codes = (x.float() / torch.where(scales > 0, scales, 1)).round().clamp(-127, 127)
    return codes.double(), scales


def expected(x: Tensor, weight: dict[str, Tensor], bias: Tensor | None = None) -> Tensor:
    """The kernels' arithmetic: sums of codes exactly, all else in fp32."""
    codes, scales = tokens_in_int8(x)
    if "zeros" not in weight:
        y = (codes @ weight["codes"].double().T).float() * (scales * weight["scales"])
    else:
        y = _by_groups(codes, weight) * scales
    if bias is not None:
        y = y + bias.float()
    return y.to(x.dtype)


def _by_groups(codes: Tensor, weight: dict[str, Tensor]) -> Tensor:
    """Group after group by fused multiply-adds, which fp64 holds before they are rounded."""
    num_groups = weight["scales"].shape[1]
    y = torch.zeros(len(codes), len(weight["codes"]))
    each = zip(codes.chunk(num_groups, 1), weight["codes"].chunk(num_groups, 1), strict=True)
    for group, (x, w) in enumerate(each):
        zeros, scales = weight["zeros"][:, group], weight["scales"][:, group]
        sums = x @ w.double().T - x.sum(1, keepdim=True) * zeros.double()
        y = (sums * scales.double() + y.double()).float()
    return y


def equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scheme", "shape"), WEIGHTS)
def test_equals_the_same_arithmetic(
    scheme: WeightScheme, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = random_weight(scheme, shape)
    made = packed(scheme, weight)
    bias = torch.randn(shape[0]).to(dtype)
    for rows in ROWS:
        x = torch.randn(rows, shape[1]).to(dtype)
        assert torch.equal(linear(x, made), expected(x, weight)), rows
        assert torch.equal(linear(x, made, bias), expected(x, weight, bias)), rows


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scheme", "shape"), WEIGHTS)
def test_is_off_the_dense_product_by_no_more_than_rounding(
    scheme: WeightScheme, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = random_weight(scheme, shape)
    plain = dequantize(weight)
    x = torch.randn(9, shape[1]).to(dtype)
    exact = x.double() @ plain.double().T
    bound = activation_rounding(x, plain) * 1.0001 + exact.abs() * torch.finfo(dtype).eps
    assert ((linear(x, packed(scheme, weight)).double() - exact).abs() <= bound).all()


@pytest.mark.parametrize(("scheme", "shape"), BOTH)
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda x: x * 0, id="zeros"),
        pytest.param(lambda x: x.index_fill(1, torch.tensor([3]), 3e38), id="largest"),
        pytest.param(lambda x: x.index_fill(1, torch.tensor([3]), -2000.0), id="outlier"),
        pytest.param(lambda x: x * 1e-37, id="small"),
        pytest.param(lambda x: x * 2**-140, id="denormal"),
        pytest.param(lambda x: x * 0 + 1e-45, id="smallest"),
        pytest.param(lambda x: (x * 8).round() / 2 + 1, id="ties"),
    ],
)
def test_extreme_tokens(
    scheme: WeightScheme, shape: tuple[int, int], make: Callable[[Tensor], Tensor]
) -> None:
    weight = random_weight(scheme, shape)
    x = make(torch.randn(5, shape[1]))
    y = linear(x, packed(scheme, weight))
    assert equal(y, expected(x, weight)) and not y.isnan().any()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    "scheme", [WeightScheme("int8"), WeightScheme("int4", MOST_INPUTS)], ids=str
)
def test_the_largest_sums_fit(scheme: WeightScheme, sign: int) -> None:
    weight = random_weight(scheme, (3, MOST_INPUTS))
    weight["codes"].fill_(127 * sign if scheme.format == "int8" else 15)
    weight.get("zeros", torch.empty(0)).fill_(0)
    x = torch.full((13, MOST_INPUTS), 2.0 * sign)
    assert torch.equal(linear(x, packed(scheme, weight)), expected(x, weight))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("position", [0, 63, 127])
@pytest.mark.parametrize(("scheme", "shape"), BOTH)
def test_a_token_that_is_not_finite_is_nan_and_the_others_are_as_before(
    scheme: WeightScheme, shape: tuple[int, int], position: int, wrong: float
) -> None:
    made = packed(scheme, random_weight(scheme, shape))
    x = torch.randn(7, shape[1])
    before = linear(x, made)
    x[4, position] = wrong
    after = linear(x, made)
    assert after[4].isnan().all()
    others = [0, 1, 2, 3, 5, 6]
    assert torch.equal(after[others], before[others])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("scheme", "shape"), WEIGHTS)
def test_a_token_does_not_depend_on_its_batch_nor_on_threads(
    scheme: WeightScheme,
    shape: tuple[int, int],
    dtype: torch.dtype,
    threads: Callable[[int], None],
) -> None:
    made = packed(scheme, random_weight(scheme, shape))
    x = torch.randn(300, shape[1]).to(dtype)
    together = linear(x, made)
    for count in (1, 2, 3):
        threads(count)
        assert torch.equal(linear(x, made), together)
        for row in (0, 7, 299):
            assert torch.equal(linear(x[row : row + 1], made)[0], together[row])


@pytest.mark.parametrize(("scheme", "shape"), WEIGHTS)
def test_reads_columns_of_wider_rows(scheme: WeightScheme, shape: tuple[int, int]) -> None:
    made = packed(scheme, random_weight(scheme, shape))
    wide = torch.randn(6, shape[1] + 9)
    x = wide[:, 4 : 4 + shape[1]]
    assert torch.equal(linear(x, made), linear(x.contiguous(), made))
    every_second = torch.randn(6, 2 * shape[1])[:, ::2]
    assert torch.equal(linear(every_second, made), linear(every_second.contiguous(), made))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("scheme", "shape"), WEIGHTS)
def test_packs_parts_of_wider_codes(
    scheme: WeightScheme, shape: tuple[int, int], count: int, threads: Callable[[int], None]
) -> None:
    weight = random_weight(scheme, shape)
    x = torch.randn(3, shape[1])
    y = linear(x, packed(scheme, weight))
    threads(count)
    wide = torch.randint(0, 9, (shape[0], shape[1] + 40), dtype=weight["codes"].dtype)
    wide[:, 5 : 5 + shape[1]] = weight["codes"]
    for codes in (wide[:, 5 : 5 + shape[1]], weight["codes"].T.contiguous().T):
        assert torch.equal(linear(x, packed(scheme, {**weight, "codes": codes})), y)


@pytest.mark.parametrize(("scheme", "shape"), AT_LOAD)
def test_says_what_it_takes(scheme: WeightScheme, shape: tuple[int, int]) -> None:
    made = packed(scheme, random_weight(scheme, shape))
    said = CpuPlatform().weight_packers()[scheme.format].packed_bytes(torch.bfloat16, shape)
    assert said == made.extra_bytes == sum(tensor.nbytes for tensor in made.tensors)
    assert made.shape == shape


@pytest.mark.parametrize("format", ["int8", "int4"])
def test_the_platform_offers_the_format(format: str) -> None:
    platform = CpuPlatform()
    assert format in platform.capabilities().weight_formats
    sizes = {"in_features": 128, "out_features": 64}
    assert native_linear().supports(OpSignature("linear", torch.bfloat16, sizes, format))


def test_refuses_more_inputs_than_sums_hold() -> None:
    codes = torch.zeros(1, MOST_INPUTS + 1, dtype=torch.int8)
    tensors: dict[str, Any] = {"codes": codes, "scales": torch.ones(1)}
    with pytest.raises(ValueError, match=f"{MOST_INPUTS + 1} inputs"):
        packed(WeightScheme("int8"), tensors)
