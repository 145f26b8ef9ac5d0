"""Typical calls of the matrix products: of dense and quantized weights, and of experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import gemm, moe, quantize
from .case import HALF, Case, float8, integers, rand, short
from .tuning import Table

INT8, E4M3, FNUZ = torch.int8, torch.float8_e4m3fn, torch.float8_e4m3fnuz
EIGHT_BITS = (INT8, E4M3, FNUZ)
Launch = Callable[[], Any]


def _ones(device: torch.device, *shape: int) -> Tensor:
    return torch.ones(shape, device=device)


def _codes(device: torch.device, *shape: int, dtype: torch.dtype) -> Tensor:
    return (rand(device, *shape, dtype=torch.float32) * 16).to(dtype)


def _int4(device: torch.device, out: int, size: int, group: int = 128) -> gemm.Int4:
    codes = integers(device, 256, out, size // 2, dtype=torch.uint8)
    zeros = torch.full((size // group, out), 8, dtype=torch.uint8, device=device)
    return gemm.Int4(codes, _ones(device, size // group, out), zeros)


def _quantize(tokens: int, size: int, dtype: torch.dtype, group: int | None) -> Case:
    def call(device: torch.device, table: Table) -> Launch:
        x = rand(device, tokens, size)
        return lambda: quantize.quantize_tokens(x, dtype, table, group)

    label = f"{tokens}x{size} {short(dtype)}{f' by {group}' if group else ''}"
    return Case("quantize_tokens", label, call, float8(dtype))


def _dense(tokens: int, size: int, out: int, dtype: torch.dtype) -> Case:
    def call(device: torch.device, table: Table) -> Launch:
        x, weight = rand(device, tokens, size, dtype=dtype), rand(device, out, size, dtype=dtype)
        return lambda: gemm.matmul(x, weight, None, table)

    return Case("gemm_dense", f"{tokens}x{size}x{out} {short(dtype)}", call)


def _scaled(tokens: int, size: int, out: int, dtype: torch.dtype) -> Case:
    def call(device: torch.device, table: Table) -> Launch:
        x, weight = (_codes(device, rows, size, dtype=dtype) for rows in (tokens, out))
        args = x, weight, _ones(device, tokens), _ones(device, out)
        return lambda: gemm.matmul_scaled(*args, None, table, dtype=HALF)

    return Case("gemm_scaled", f"{tokens}x{size}x{out} {short(dtype)}", call, float8(dtype))


def _blocks(tokens: int, size: int, out: int, dtype: torch.dtype) -> Case:
    def call(device: torch.device, table: Table) -> Launch:
        x, weight = (_codes(device, rows, size, dtype=dtype) for rows in (tokens, out))
        scales = _ones(device, tokens, size // 128), _ones(device, out // 128, size // 128)
        return lambda: gemm.matmul_blocks(x, weight, *scales, None, table, dtype=HALF)

    return Case("gemm_blocks", f"{tokens}x{size}x{out} {short(dtype)}", call, float8(dtype))


def _four_bits(
    tokens: int, size: int, out: int, dtype: torch.dtype = HALF, group: int = 128
) -> Case:
    def call(device: torch.device, table: Table) -> Launch:
        x, weight = rand(device, tokens, size, dtype=dtype), _int4(device, out, size, group)
        return lambda: gemm.matmul_int4(x, weight, None, table)

    return Case("gemm_int4", f"{tokens}x{size}x{out} {short(dtype)} by {group}", call)


def _reduce() -> Case:
    return _four_bits(16, 4096, 4096)._replace(kernel="gemm_reduce")


def _route(tokens: int, experts: int, top_k: int) -> Case:
    def call(device: torch.device, table: Table) -> Launch:
        scores = rand(device, tokens, experts)
        return lambda: moe.route(scores, top_k, True, HALF, table)

    return Case("moe_route", f"{tokens}, {top_k} of {experts}", call)


def _sort(tokens: int, experts: int, top_k: int) -> Case:
    def call(device: torch.device, table: Table) -> Launch:
        chosen = integers(device, experts, tokens, top_k)
        return lambda: moe.sort_by_expert(chosen, experts, table)

    return Case("moe_sort", f"{tokens}, {top_k} of {experts}", call)


def _combine(tokens: int, top_k: int, size: int) -> Case:
    def call(device: torch.device, table: Table) -> Launch:
        results, shares = rand(device, tokens * top_k, size), rand(device, tokens, top_k)
        return lambda: moe.combine(results, shares, table)

    return Case("moe_combine", f"{tokens}x{top_k}x{size}", call)


HIDDEN, WIDTH, EXPERTS, TOP_K = 2048, 768, 128, 8
"""Qwen3-30B-A3B."""
EXPERT_TOKENS = (16, 512, 4096)


def _experts(
    kernel: str, tokens: int, weight: Callable[[torch.device, int, int], moe.Experts], label: str
) -> Case:
    """Both products of a layer whose experts have as many pairs each."""

    def call(device: torch.device, table: Table) -> Launch:
        dtype = torch.float32 if label == "float32" else HALF
        x = rand(device, tokens, HIDDEN, dtype=dtype)
        inner = rand(device, tokens * TOP_K, WIDTH, dtype=dtype)
        gate_up = weight(device, EXPERTS * 2 * WIDTH, HIDDEN)
        down = weight(device, EXPERTS * HIDDEN, WIDTH)
        order = torch.arange(tokens * TOP_K, dtype=torch.int32, device=device)
        each = tokens * TOP_K // EXPERTS
        counts = torch.full((EXPERTS,), each, dtype=torch.int32, device=device)
        return lambda: (
            moe.expert_products(x, gate_up, order, counts, table, gated=True),
            moe.expert_products(inner, down, order, counts, table, gated=False),
        )

    fp8 = next((dtype for dtype in (E4M3, FNUZ) if short(dtype) == label), None)
    return Case(kernel, f"{tokens} tokens {label}", call, fp8)


def _dense_experts(tokens: int, dtype: torch.dtype) -> Case:
    def weight(device: torch.device, out: int, size: int) -> Tensor:
        return rand(device, out, size, dtype=dtype)

    return _experts("moe_dense", tokens, weight, short(dtype))


def _scaled_experts(tokens: int, dtype: torch.dtype) -> Case:
    def weight(device: torch.device, out: int, size: int) -> moe.Coded:
        return moe.Coded(_codes(device, out, size, dtype=dtype), _ones(device, out))

    return _experts("moe_scaled", tokens, weight, short(dtype))


def _block_experts(tokens: int, dtype: torch.dtype) -> Case:
    def weight(device: torch.device, out: int, size: int) -> moe.Coded:
        codes = _codes(device, out, size, dtype=dtype)
        return moe.Coded(codes, _ones(device, out // 128, size // 128))

    return _experts("moe_blocks", tokens, weight, short(dtype))


def gemm_cases() -> tuple[Case, ...]:
    """Decode steps of 16 tokens into few and many outputs, of 64, and a prefill of 4096."""
    shapes = [(16, 4096, 4096), (16, 4096, 12288), (64, 4096, 12288), (4096, 4096, 12288)]
    return (
        *(_quantize(256, size, torch.int8, None) for size in (128, 4096, 28672)),
        *(_quantize(256, 7168, dtype, 128) for dtype in (E4M3, FNUZ)),
        *(_dense(*shape, HALF) for shape in shapes),
        _dense(256, 4096, 4096, torch.float32),
        *(_scaled(*shape, dtype) for dtype in EIGHT_BITS for shape in shapes),
        *(_blocks(*shape, dtype) for dtype in (E4M3, FNUZ) for shape in shapes),
        *(_four_bits(*shape) for shape in shapes),
        _four_bits(16, 4096, 4096, torch.float16, 32),
        _reduce(),
        *(_route(256, experts, TOP_K) for experts in (EXPERTS, 512)),
        *(_sort(tokens, EXPERTS, TOP_K) for tokens in (16, 4096)),
        _combine(256, TOP_K, HIDDEN),
        *(_dense_experts(tokens, HALF) for tokens in EXPERT_TOKENS),
        _dense_experts(256, torch.float32),
        *(_scaled_experts(tokens, dtype) for dtype in EIGHT_BITS for tokens in EXPERT_TOKENS),
        *(_block_experts(tokens, dtype) for dtype in (E4M3, FNUZ) for tokens in EXPERT_TOKENS),
        *(_experts("moe_int4", tokens, _int4, "bfloat16") for tokens in EXPERT_TOKENS),
    )
