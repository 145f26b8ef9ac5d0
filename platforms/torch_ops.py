"""Ops by torch's own kernels, in fewer calls than their references; the same on any device."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .interface import OpImpl, OpSignature, Support


class TorchOp(OpImpl):
    """An op by torch's kernels, whatever the size; `name`: what its platform calls it."""

    def __init__(self, name: str = "torch") -> None:
        self.name = name

    def supports(self, sig: OpSignature) -> Support:
        return Support.yes("torch's own kernels")


class RmsNorm(TorchOp):
    """The whole norm in one call; 16-bit results are rounded once, after the weight."""

    op = "rms_norm"

    def __call__(self, *args: Any) -> Any:
        x, weight, eps = args
        return F.rms_norm(x, weight.shape, weight, eps)


class GatedActivation(TorchOp):
    """The activation's own result is multiplied in place: one pass over memory less."""

    def __init__(self, op: str, activation: Callable[[Tensor], Tensor], name: str) -> None:
        super().__init__(name)
        self.op = op
        self._activation = activation

    def __call__(self, *args: Any) -> Any:
        gate, up = args[0].chunk(2, dim=-1)
        return self._activation(gate).mul_(up)


def common_ops(name: str = "torch") -> list[OpImpl]:
    """The norm and the gated activations."""
    return [
        RmsNorm(name),
        GatedActivation("silu_mul", F.silu, name),
        GatedActivation("gelu_mul", F.gelu, name),
        GatedActivation("gelu_tanh_mul", functools.partial(F.gelu, approximate="tanh"), name),
    ]
