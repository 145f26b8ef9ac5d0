"""Ops on a GPU by torch's own kernels, in fewer launches than their references. Nothing here
waits for the device or keeps a tensor from one call to the next, so that a step can be captured."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .interface import DENSE, OpImpl, OpSignature, Support


class TorchOp(OpImpl):
    """An op by torch's kernels, whatever the size."""

    name = "torch"

    def supports(self, sig: OpSignature) -> Support:
        return Support.yes("torch's own kernels")


class Linear(TorchOp):
    """cuBLAS or hipBLASLt through torch."""

    op = "linear"

    def __call__(self, *args: Any) -> Any:
        x, weight, bias = args
        if weight.format != DENSE:
            raise ValueError(f"torch's linear reads dense weights, not {weight.format!r}.")
        return F.linear(x, weight.tensors[0], bias)


class RmsNorm(TorchOp):
    """The whole norm in one call; 16-bit results are rounded once, after the weight."""

    op = "rms_norm"

    def __call__(self, *args: Any) -> Any:
        x, weight, eps = args
        return F.rms_norm(x, weight.shape, weight, eps)


class Rope(TorchOp):
    """Query and key turn together: half the launches of the reference, bit-equal to it."""

    op = "rope"

    def __call__(self, *args: Any) -> Any:
        query, key, positions, cos_sin = args
        heads, size = query.shape[1], cos_sin.shape[1]
        row = cos_sin.index_select(0, positions[0]).to(query.dtype).unsqueeze(1)
        cos, sin = row.chunk(2, dim=-1)
        both = torch.cat((query, key), dim=1)  # [tokens, heads + kv_heads, head_dim]
        turned = both[..., :size]
        swapped = turned.view(*both.shape[:2], 2, size // 2).flip(2).view(turned.shape)
        turned.mul_(torch.cat((cos, cos), dim=-1))
        turned.add_(swapped.mul_(torch.cat((-sin, sin), dim=-1)))
        return both[:, :heads], both[:, heads:]


class GatedActivation(TorchOp):
    """The activation's own result is multiplied in place."""

    def __init__(self, op: str, activation: Callable[[Tensor], Tensor]) -> None:
        self.op = op
        self._activation = activation

    def __call__(self, *args: Any) -> Any:
        gate, up = args[0].chunk(2, dim=-1)
        return self._activation(gate).mul_(up)


def gpu_ops() -> dict[str, list[OpImpl]]:
    impls: list[OpImpl] = [
        Linear(),
        RmsNorm(),
        Rope(),
        GatedActivation("silu_mul", F.silu),
        GatedActivation("gelu_mul", F.gelu),
        GatedActivation("gelu_tanh_mul", functools.partial(F.gelu, approximate="tanh")),
    ]
    return {impl.op: [impl] for impl in impls}
