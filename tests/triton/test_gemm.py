"""Matrix products by dense, int8, FP8 and int4 weights, and the quantizing of what they multiply.

Expected is the product in float64 of what the codes stand for.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from helpers.interpreter import skip_unknown
from torch import Tensor

from trimaran.kernels_cuda.portable import gemm
from trimaran.kernels_cuda.portable.quantize import quantize_tokens
from trimaran.kernels_cuda.portable.tuning import Table
from trimaran.platforms.attention_reference import quantize_vectors
from trimaran.platforms.ops import OPS

FP8 = torch.float8_e4m3fn
# (tokens, in, out): both of a table's entries, whole tiles and parts of them, fewer inputs than a
# step of the loop has, more rows than a band of tiles.
SHAPES = [(1, 64, 64), (5, 200, 100), (33, 72, 130), (70, 256, 64), (32, 24, 17), (530, 32, 70)]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def close(found: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    """Within the tolerance of `linear`, for results of that order of magnitude."""
    tolerance = OPS["linear"].tolerance[found.dtype]
    torch.testing.assert_close(
        found.double(),
        expected,
        rtol=tolerance.rtol,
        atol=tolerance.atol * scale,
        equal_nan=True,
    )


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found = x.double() @ weight.double().T
    return found if bias is None else found + bias.double()


def random_scales(*shape: int) -> Tensor:
    return torch.rand(shape) * 0.01 + 0.001


def random_codes(*shape: int, dtype: torch.dtype) -> Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 128, shape, dtype=dtype)
    return (torch.randn(shape) * 4).to(dtype)


def skip_missing(dtype: torch.dtype, device: torch.device) -> None:
    """CDNA 3 alone computes with floats that have one zero."""
    if dtype != torch.float8_e4m3fnuz:
        return
    if device.type == "cuda":
        name = getattr(torch.cuda.get_device_properties(device), "gcnArchName", "")
        if not name.startswith("gfx94"):
            pytest.skip("not a float of this card")
    skip_unknown(torch.float8_e4m3fnuz)


def expand(scales: Tensor, rows: int, columns: int) -> Tensor:
    """Scales of blocks of 128 by 128, or of 1 by 128, for each value."""
    if scales.shape[0] != rows:
        scales = scales.repeat_interleave(128, 0)[:rows]
    return scales.repeat_interleave(128, 1)[:, :columns]


def int4_weight(out: int, size: int, group: int) -> tuple[gemm.Int4, Tensor]:
    codes = torch.randint(0, 16, (out, size), dtype=torch.uint8)
    zeros = torch.randint(0, 16, (out, size // group), dtype=torch.uint8)
    scales = random_scales(out, size // group)
    values = (codes.double() - zeros.repeat_interleave(group, 1)) * scales.double()[
        :, :, None
    ].expand(-1, -1, group).reshape(out, size)
    return gemm.pack_int4(codes, scales, zeros), values


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, table: Table
) -> None:
    tokens, size, out = shape
    x, weight = torch.randn(tokens, size).to(dtype), torch.randn(out, size).to(dtype) / size**0.5
    bias = torch.randn(out).to(dtype) if out % 2 == 0 else None
    place = None if bias is None else bias.to(device)
    found = gemm.matmul(x.to(device), weight.to(device), place, table)
    assert found.dtype == dtype
    close(found.cpu(), product(x, weight, bias))


@pytest.mark.parametrize("one_scale", [False, True], ids=["rows", "one"])
@pytest.mark.parametrize("codes", [torch.int8, FP8, torch.float8_e4m3fnuz], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eight_bits(
    shape: tuple[int, int, int],
    codes: torch.dtype,
    one_scale: bool,
    device: torch.device,
    table: Table,
) -> None:
    skip_missing(codes, device)
    tokens, size, out = shape
    x, weight = random_codes(tokens, size, dtype=codes), random_codes(out, size, dtype=codes)
    x_scales, scales = (random_scales(*(() if one_scale else (n,))) for n in (tokens, out))
    bias = torch.randn(out)
    dtype = torch.float32 if one_scale else torch.float16
    args = (each.to(device) for each in (x, weight, x_scales, scales, bias))
    found = gemm.matmul_scaled(*args, table, dtype=dtype)
    assert found.dtype == dtype
    values = (x.double() * x_scales.reshape(-1, 1), weight.double() * scales.reshape(-1, 1))
    close(found.cpu(), product(*values, bias))


@pytest.mark.parametrize("tokens", [2, 40])
def test_int8_sums_are_exact(tokens: int, device: torch.device, table: Table) -> None:
    """Half of the inputs sum up to an odd number past 2^24, where fp32 has none; that is also what
    a split sum keeps."""
    x = torch.full((tokens, 3072), 127, dtype=torch.int8, device=device)
    weight = torch.full((3, 3072), 127, dtype=torch.int8, device=device)
    weight[:, 0], weight[:, 1], weight[:, 1536:] = 1, 2, -127
    ones = torch.ones((), device=device)
    found = gemm.matmul_scaled(x, weight, ones, ones, None, table, dtype=torch.float32)
    assert found.eq(127.0 * (1 + 2 - 2 * 127)).all()


@pytest.mark.parametrize("codes", [FP8, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("shape", [(1, 128, 128), (5, 300, 200), (40, 256, 130)], ids=str)
def test_blocks(
    shape: tuple[int, int, int], codes: torch.dtype, device: torch.device, table: Table
) -> None:
    """Also activations in the other 8-bit float."""
    tokens, size, out = shape
    x, weight = random_codes(tokens, size, dtype=codes), random_codes(out, size, dtype=FP8)
    x_scales = random_scales(tokens, -(-size // 128))
    scales = random_scales(-(-out // 128), -(-size // 128))
    args = (each.to(device) for each in (x, weight, x_scales, scales))
    found = gemm.matmul_blocks(*args, None, table, dtype=torch.float32)
    values = (
        x.double() * expand(x_scales, tokens, size),
        weight.double() * expand(scales, out, size),
    )
    close(found.cpu(), product(*values, None))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("tokens", [1, 7, 40])
def test_int4(
    tokens: int, group: int, dtype: torch.dtype, device: torch.device, table: Table
) -> None:
    size, out = 384, 100
    weight, values = int4_weight(out, size, group)
    x, bias = torch.randn(tokens, size).to(dtype), torch.randn(out).to(dtype)
    placed = gemm.Int4(*(each.to(device) for each in weight))
    found = gemm.matmul_int4(x.to(device), placed, bias.to(device), table)
    assert found.dtype == x.dtype
    close(found.cpu(), product(x, values, bias))


@triton.jit
def _subtract(code_ptr, zero_ptr, out_ptr, dtype: tl.constexpr, BF16_ADD: tl.constexpr):
    row, column = tl.arange(0, 16), tl.arange(0, 16)
    at = row[:, None] * 16 + column[None, :]
    value = gemm._less_zero(tl.load(code_ptr + at), tl.load(zero_ptr + row), dtype, BF16_ADD)
    tl.store(out_ptr + at, value.to(tl.float32))


@pytest.mark.parametrize("bf16_add", [False, True])
@pytest.mark.parametrize("dtype", [tl.float16, tl.bfloat16], ids=str)
def test_every_int4_code_with_every_zero(
    dtype: tl.dtype, bf16_add: bool, device: torch.device
) -> None:
    numbers = torch.arange(16, dtype=torch.uint8, device=device)
    codes = numbers.expand(16, 16).contiguous()
    found = torch.empty(16, 16, device=device)
    _subtract[(1,)](codes, numbers, found, dtype, bf16_add)
    assert found.equal(codes.float() - numbers[:, None])


def test_int4_groups_are_checked() -> None:
    codes = torch.zeros(4, 96, dtype=torch.uint8)
    with pytest.raises(ValueError, match="2 groups of 96"):
        gemm.pack_int4(codes, torch.ones(4, 2), torch.ones(4, 2))


@pytest.mark.parametrize("tokens", [5, 40])
def test_what_is_no_number_stays_in_its_row(
    tokens: int, device: torch.device, table: Table
) -> None:
    """Although a step of the loop reaches into the next row; whatever is past the last, too."""
    x = torch.full((tokens + 1, 200), float("nan"), dtype=torch.float16, device=device)[:tokens]
    x.copy_(torch.randn(tokens, 200))
    x[2, 0] = float("nan")
    x[3, 199] = float("inf")
    weight = torch.randn(50, 200, device=device).half()
    found = gemm.matmul(x, weight, None, table)
    assert found.isfinite().all(1).nonzero().flatten().tolist() == [0, 1, *range(4, tokens)]
    close(found, product(x, weight, None))


# ---------------------------------------------------------------------------------------------
# Quantizing
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 64), (9, 300), (3, 5000)], ids=str)
def test_int8_codes_of_tokens(shape: tuple[int, int], device: torch.device, table: Table) -> None:
    x = torch.randn(shape, device=device)
    x[-1] = 0.0 if shape[0] > 1 else 2.0
    codes, scales = quantize_tokens(x, torch.int8, table)
    expected, expected_scales = quantize_vectors(x)
    torch.testing.assert_close(scales, expected_scales)
    assert (codes.int() - expected.int()).abs().max() <= 1  # a tie may fall either way
    assert (codes != expected).float().mean() < 0.01


@pytest.mark.parametrize("size", [8, 5000])
def test_int8_ties_go_to_the_even_code(size: int, device: torch.device, table: Table) -> None:
    """The largest is 127, so that the scale is 1."""
    x = (torch.arange(size, device=device) % 254 - 126.5).repeat(2, 1)
    x[:, -1] = 127.0
    codes, scales = quantize_tokens(x, torch.int8, table)
    assert scales.eq(1).all()
    assert codes.equal(x.round().to(torch.int8))


@pytest.mark.parametrize("size", [128, 300, 512])
def test_groups_have_scales_of_their_own(size: int, device: torch.device, table: Table) -> None:
    x = torch.randn(5, size, device=device) * torch.logspace(-2, 2, size, device=device)
    codes, scales = quantize_tokens(x, FP8, table, group=128)
    assert scales.shape == (5, -(-size // 128))
    for number, values in enumerate(x.split(128, dim=1)):
        most = values.abs().amax(1)
        torch.testing.assert_close(scales[:, number], most / 448)
        expected = (values / scales[:, number, None]).to(FP8).float()
        same = codes.split(128, dim=1)[number].float() == expected
        assert same.float().mean() > 0.99  # a tie may fall either way


@pytest.mark.parametrize("size", [100, 5000])
def test_a_row_that_is_not_finite_has_no_scale(
    size: int, device: torch.device, table: Table
) -> None:
    x = torch.randn(4, size, device=device)
    x[1, size - 1], x[2, 3] = float("nan"), float("-inf")
    _, scales = quantize_tokens(x, torch.int8, table)
    assert scales.isnan().tolist() == [False, True, True, False]
