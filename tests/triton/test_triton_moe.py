"""Mixture of experts against the op's reference, by dense and by quantized weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trimaran.kernels_cuda.portable import moe
from trimaran.kernels_cuda.portable.gemm import pack_int4
from trimaran.kernels_cuda.portable.tuning import Table
from trimaran.platforms import ops
from trimaran.platforms.interface import PackedWeight

FP8 = torch.float8_e4m3fn
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# (tokens, experts, top_k, hidden, width)
SIZES = [(1, 4, 2, 64, 32), (5, 7, 1, 40, 50), (33, 6, 3, 40, 70), (90, 3, 3, 32, 64)]


def dense(weight: Tensor) -> PackedWeight:
    return PackedWeight(ops.DENSE, (weight.shape[0], weight.shape[1]), (weight,))


def reference(
    x: Tensor, scores: Tensor, gate_up: Tensor, down: Tensor, top_k: int, renormalize: bool = True
) -> Tensor:
    return ops.moe(x, scores, dense(gate_up), dense(down), top_k, renormalize)


def close(found: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    tolerance = ops.OPS["moe"].tolerance[found.dtype]
    torch.testing.assert_close(
        found, expected, rtol=tolerance.rtol * scale, atol=tolerance.atol * scale, equal_nan=True
    )


def layer(
    sizes: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, scores and dense weights."""
    tokens, experts, _, hidden, width = sizes
    x = torch.randn(tokens, hidden).to(device, dtype)
    scores = torch.randn(tokens, experts).to(device, dtype)
    gate_up = (torch.randn(experts * 2 * width, hidden) / hidden**0.5).to(device, dtype)
    down = (torch.randn(experts * hidden, width) / width**0.5).to(device, dtype)
    return x, scores, gate_up, down


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_dense(
    sizes: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device, table: Table
) -> None:
    args = layer(sizes, dtype, device)
    top_k, renormalize = sizes[2], sizes[0] % 2 == 1
    found = moe.moe(*args, top_k, renormalize, table)
    close(found, reference(*args, top_k, renormalize))


def test_all_tokens_may_want_one_expert(device: torch.device, table: Table) -> None:
    """Most experts have no pair then, and the last tile of one has few."""
    x, scores, gate_up, down = layer((35, 8, 2, 32, 32), torch.float32, device)
    scores[:, 5], scores[:, 1] = 20.0, 10.0
    close(moe.moe(x, scores, gate_up, down, 2, True, table), reference(x, scores, gate_up, down, 2))


def test_what_is_no_number_stays_in_its_token(device: torch.device, table: Table) -> None:
    x, scores, gate_up, down = layer((20, 4, 2, 48, 32), torch.float16, device)
    x[3, 7] = float("nan")
    scores[9, 1] = float("nan")
    found = moe.moe(x, scores, gate_up, down, 2, True, table)
    close(found, reference(x, scores, gate_up, down, 2))
    assert found.isnan().any(1).nonzero().flatten().tolist() == [3, 9]


# ---------------------------------------------------------------------------------------------
# Routing and sorting
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 8, 2), (9, 60, 4), (3, 256, 8), (5, 3, 3)], ids=str)
def test_routing(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, table: Table
) -> None:
    """Many scores are equal: of those the first is taken."""
    tokens, experts, top_k = shape
    scores = (torch.randn(tokens, experts) * 2).round().to(device, dtype)
    chosen, shares = moe.route(scores, top_k, False, torch.float32, table)
    expected = scores.float().sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    assert chosen.long().equal(expected)
    softmax = scores.float().softmax(-1).gather(1, expected)
    torch.testing.assert_close(shares, softmax)
    _, shares = moe.route(scores, top_k, True, torch.float32, table)
    torch.testing.assert_close(shares, softmax / softmax.sum(-1, keepdim=True))


def test_routing_of_odd_scores(device: torch.device, table: Table) -> None:
    """Every token has as many experts as it takes, each once, and those of the reference."""
    low, nan, high = float("-inf"), float("nan"), float("inf")
    rows = [[low] * 5, [low, 1.0, low, low, low], [0.0, nan, 3.0, high, -nan], [high] * 5]
    rows.append([-1.0, -0.0, 0.0, -0.0, -1.0])
    scores = torch.tensor(rows, device=device)
    chosen, shares = moe.route(scores, 3, False, torch.float32, table)
    expected = scores.sort(dim=-1, descending=True, stable=True).indices[:, :3]
    assert chosen.long().equal(expected)
    torch.testing.assert_close(shares, scores.softmax(-1).gather(1, expected), equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 1, 4), (3, 2, 5), (100, 8, 16), (300, 8, 16)], ids=str)
def test_sorting(shape: tuple[int, int, int], device: torch.device, table: Table) -> None:
    """Each expert's pairs are in their order; also over more than one turn of the loop."""
    tokens, top_k, experts = shape
    chosen = torch.randint(0, experts, (tokens, top_k), dtype=torch.int32, device=device)
    order, counts = moe.sort_by_expert(chosen, experts, table)
    assert order.long().equal(chosen.flatten().sort(stable=True).indices)
    assert counts.long().equal(chosen.flatten().bincount(minlength=experts))


# ---------------------------------------------------------------------------------------------
# Quantized experts
# ---------------------------------------------------------------------------------------------


def quantized(weight: Tensor, dtype: torch.dtype) -> tuple[moe.Coded, Tensor]:
    """With a scale a row, and the values that it stands for."""
    scales = weight.abs().amax(1) / (127 if dtype == torch.int8 else 448)
    codes = weight / scales[:, None]
    codes = (codes.round() if dtype == torch.int8 else codes).to(dtype)
    return moe.Coded(codes, scales), codes.float() * scales[:, None]


def in_blocks(weight: Tensor, dtype: torch.dtype) -> tuple[moe.Coded, Tensor]:
    rows, size = weight.shape
    scales = torch.rand(rows // 128, size // 128, device=weight.device) * 0.01 + 0.001
    wide = scales.repeat_interleave(128, 0).repeat_interleave(128, 1)
    codes = (weight / wide).to(dtype)
    return moe.Coded(codes, scales), codes.float() * wide


@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=str)
@pytest.mark.parametrize("tokens", [1, 21])
def test_experts_in_eight_bits(
    tokens: int, dtype: torch.dtype, device: torch.device, table: Table
) -> None:
    x, scores, gate_up, down = layer((tokens, 5, 2, 64, 48), torch.float32, device)
    (coded, gate_up), (coded_down, down) = quantized(gate_up, dtype), quantized(down, dtype)
    found = moe.moe(x, scores, coded, coded_down, 2, True, table)
    off = (found - reference(x, scores, gate_up, down, 2)).square().mean().sqrt()
    # Activations are rounded twice: int8 to half of 1/127 of the largest, fp8 to 1/16 of each.
    most = 0.02 if dtype == torch.int8 else 0.06
    assert off < most * reference(x, scores, gate_up, down, 2).square().mean().sqrt()


@pytest.mark.parametrize("gated", [True, False])
def test_experts_in_blocks(gated: bool, device: torch.device, table: Table) -> None:
    """By activations that their 8 bits hold exactly."""
    experts, tokens, outputs = 3, 20, 128
    x = torch.randint(-8, 9, (tokens, 256), device=device).float()
    x[:, ::128] = 14.0 * 32
    x[:, 128:] *= 2
    rows = experts * outputs * (2 if gated else 1)
    coded, weight = in_blocks(torch.randn(rows, 256, device=device), FP8)
    chosen = torch.randint(0, experts, (tokens, 1), dtype=torch.int32, device=device)
    order, counts = moe.sort_by_expert(chosen, experts, table)
    found = moe.expert_products(x, coded, order, counts, table, gated=gated)
    weights = weight.chunk(experts)
    for token in range(tokens):
        expected = weights[chosen[token, 0]] @ x[token]
        if gated:
            expected = ops.silu_mul(expected[None])[0]
        torch.testing.assert_close(found[token], expected, rtol=1e-4, atol=1e-2)


def test_blocks_that_span_experts_are_refused(device: torch.device, table: Table) -> None:
    weight = moe.Coded(torch.zeros(2 * 192, 128).to(FP8), torch.ones(3, 1))
    order, counts = torch.zeros(1, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="192 outputs"):
        moe.expert_products(torch.zeros(1, 128), weight, order, counts, table, gated=False)


@pytest.mark.parametrize("tokens", [1, 21])
def test_experts_in_four_bits(tokens: int, device: torch.device, table: Table) -> None:
    x, scores, *weights = layer((tokens, 5, 2, 64, 32), torch.float16, device)
    packed, values = [], []
    for weight in weights:
        groups = weight.shape[1] // 32
        codes = torch.randint(0, 16, weight.shape, dtype=torch.uint8, device=device)
        zeros = torch.randint(0, 16, (len(weight), groups), dtype=torch.uint8, device=device)
        scales = torch.rand(len(weight), groups, device=device) / 64
        packed.append(pack_int4(codes, scales, zeros))
        spread = (each.repeat_interleave(32, 1).float() for each in (zeros, scales))
        values.append((codes - next(spread)) * next(spread))
    found = moe.moe(x, scores, *packed, 2, True, table)
    assert found.dtype == x.dtype
    expected = reference(x.float(), scores.float(), *values, 2)
    torch.testing.assert_close(found.float(), expected, rtol=4e-3, atol=8e-3)
