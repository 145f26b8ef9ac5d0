"""Typical calls of every kernel, for those who compile, check or time them one by one.

A case makes its tensors on the device it is given; on `meta` they have no memory, which is enough
to compile what the call would launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from . import norm
from .case import Case as Case
from .case import float8, rand, short
from .cases_attention import attention_cases
from .cases_gemm import gemm_cases
from .cases_step import step_cases
from .tuning import Table


def _norm(tokens: int, size: int, residual: bool, dtype: torch.dtype | None) -> Case:
    def call(device: torch.device, table: Table) -> Callable[[], Any]:
        x, other = rand(device, tokens, size), rand(device, tokens, size) if residual else None
        weight = rand(device, size)
        if dtype is not None:
            return lambda: norm.rms_norm_quantized(
                x, weight, 1e-6, table, dtype=dtype, residual=other
            )
        if other is not None:
            return lambda: norm.add_rms_norm(x, other, weight, 1e-6, table)
        return lambda: norm.rms_norm(x, weight, 1e-6, table)

    label = f"{tokens}x{size}{' +residual' if residual else ''}"
    if dtype is None:
        return Case("rms_norm", label, call)
    return Case("rms_norm", f"{label} {short(dtype)}", call, float8(dtype))


CASES: tuple[Case, ...] = (
    _norm(4096, 128, False, None),
    _norm(256, 4096, True, None),
    _norm(256, 4096, True, torch.int8),
    _norm(256, 16384, True, None),
    _norm(256, 16384, True, torch.float8_e4m3fn),
    _norm(256, 16384, True, torch.float8_e4m3fnuz),
    *step_cases(),
    *gemm_cases(),
    *attention_cases(),
)
