"""Cases of the kernels between a step's matrix products: activations, cache, sampling, batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from . import activation
from .case import Case, float8, rand, short
from .tuning import Table

Launch = Callable[[], Any]
QUANTIZED = (torch.int8, torch.float8_e4m3fn, torch.float8_e4m3fnuz)


def _gated(kind: str, tokens: int, size: int) -> Case:
    run = {
        "silu": activation.silu_mul,
        "gelu": activation.gelu_mul,
        "gelu_tanh": activation.gelu_tanh_mul,
    }[kind]

    def call(device: torch.device, table: Table) -> Launch:
        gate_up = rand(device, tokens, 2 * size)
        return lambda: run(gate_up, table)

    return Case("gated", f"{kind} {tokens}x{size}", call)


def _gated_quantized(tokens: int, size: int, dtype: torch.dtype) -> Case:
    def call(device: torch.device, table: Table) -> Launch:
        gate_up = rand(device, tokens, 2 * size)
        return lambda: activation.gated_quantized(gate_up, "silu", table, dtype=dtype)

    return Case("gated_quantized", f"silu {tokens}x{size} {short(dtype)}", call, float8(dtype))


def _add(tokens: int, size: int) -> Case:
    def call(device: torch.device, table: Table) -> Launch:
        a, b = rand(device, tokens, size), rand(device, tokens, size)
        return lambda: activation.add(a, b, table)

    return Case("add", f"{tokens}x{size}", call)


def step_cases() -> Iterator[Case]:
    for kind in ("silu", "gelu", "gelu_tanh"):
        yield _gated(kind, 256, 14336)
    yield _gated("silu", 256, 768)
    for dtype in QUANTIZED:
        yield _gated_quantized(256, 3072, dtype)
        yield _gated_quantized(256, 14336, dtype)
        yield _gated_quantized(256, 53248, dtype)
    yield _add(256, 4096)
