"""What a case of `cases.py` is, and how it makes its tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .tuning import Table

HALF = torch.bfloat16


class Case(NamedTuple):
    """`kernel`: the table's name for what is launched; `label` tells its cases apart; `call` makes
    the tensors and returns the launch, which returns all that it computed, what it wrote in place
    included: of the same numbers always the same. `fp8`: the 8-bit float that it wants converted,
    if any. `head_dim`: of an attention's heads."""

    kernel: str
    label: str
    call: Callable[[torch.device, Table], Callable[[], Any]]
    fp8: torch.dtype | None = None
    head_dim: int = 0

    def fits(self, table: Table) -> bool:
        """Does the architecture have the numbers it wants, and the room?"""
        known = self.fp8 is None or short(self.fp8) in table.fp8
        return known and self.head_dim <= table.max_head_dim


def short(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def float8(dtype: torch.dtype | None) -> torch.dtype | None:
    """What `Case.fp8` says of a case that stores `dtype`."""
    return dtype if dtype is not None and dtype.itemsize == 1 and dtype != torch.int8 else None


def rand(device: torch.device, *shape: int, dtype: torch.dtype = HALF) -> Tensor:
    """Normal deviates; of dtypes that have none, whatever they round to."""
    return torch.empty(shape, dtype=torch.float32, device=device).normal_().to(dtype)


def integers(
    device: torch.device, high: int, *shape: int, dtype: torch.dtype = torch.int32
) -> Tensor:
    """Uniform in [0, high)."""
    return torch.empty(shape, dtype=dtype, device=device).random_(0, high)
