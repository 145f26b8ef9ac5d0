"""Ops on a GPU by the portable Triton kernels. Importing this imports Triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..kernels_cuda.portable import activation, cache, norm, sampling
from ..kernels_cuda.portable.tuning import Table
from .interface import OpImpl, OpSignature, Support

COMPUTED = (torch.float32, torch.float16, torch.bfloat16)


class TritonOp(OpImpl):
    """An op by a kernel's launch function, which takes the op's arguments and a tuning table."""

    name = "triton"
    priority = 10

    def __init__(self, op: str, launch: Callable[..., Any], table: Table) -> None:
        self.op = op
        self._launch = launch
        self.table = table

    def supports(self, sig: OpSignature) -> Support:
        if sig.dtype not in COMPUTED:
            return Support.no(f"no kernel for {sig.dtype}")
        return Support.yes(f"portable, tuned for {self.table.architecture}")

    def __call__(self, *args: Any) -> Any:
        return self._launch(*args, self.table)


LAUNCHES: dict[str, Callable[..., Any]] = {
    "rms_norm": norm.rms_norm,
    "add_rms_norm": norm.add_rms_norm,
    "silu_mul": activation.silu_mul,
    "gelu_mul": activation.gelu_mul,
    "gelu_tanh_mul": activation.gelu_tanh_mul,
    "add": activation.add,
    "rope": cache.rope,
    "sample": sampling.argmax,
    "draw": lambda logits, floats, ints, short, table: sampling.draw(logits, floats, ints, table),
}
"""By op, what takes its arguments and then a table. (`draw` is told `short` for references that
look at the first candidates alone: the kernel makes its own list.)"""


def triton_ops(table: Table) -> list[OpImpl]:
    return [TritonOp(op, launch, table) for op, launch in LAUNCHES.items()]
