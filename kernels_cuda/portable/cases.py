"""Typical calls of every kernel, for those who compile, check or time them one by one.

A case makes its tensors on the device it is given; on `meta` they have no memory, which is enough
to compile what the call would launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import norm
from .cases_attention import attention_cases
from .tuning import Table

HALF = torch.bfloat16


class Case(NamedTuple):
    """`kernel`: the table's name for what is launched; `label` tells its cases apart; `call` makes
    the tensors and returns the launch. `fp8`: the 8-bit float that it wants converted, if any."""

    kernel: str
    label: str
    call: Callable[[torch.device, Table], Callable[[], Any]]
    fp8: torch.dtype | None = None

    def fits(self, table: Table) -> bool:
        """Does the architecture have the numbers it wants?"""
        return self.fp8 is None or short(self.fp8) in table.fp8


def short(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def rand(device: torch.device, *shape: int, dtype: torch.dtype = HALF) -> Tensor:
    """Normal deviates; of dtypes that have none, whatever they round to."""
    return torch.empty(shape, dtype=torch.float32, device=device).normal_().to(dtype)


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
    fp8 = dtype if dtype.is_floating_point else None
    return Case("rms_norm", f"{label} {short(dtype)}", call, fp8)


CASES: tuple[Case, ...] = (
    _norm(4096, 128, False, None),
    _norm(256, 4096, True, None),
    _norm(256, 4096, True, torch.int8),
    _norm(256, 16384, True, None),
    _norm(256, 16384, True, torch.float8_e4m3fn),
    _norm(256, 16384, True, torch.float8_e4m3fnuz),
    *attention_cases(Case),
)
