"""The ops of the cpu platform in fewer torch calls than their references."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cpu_linear import Linear
from .interface import OpImpl, OpSignature, Support


class CpuOp(OpImpl):
    """An op of this platform that takes every size."""

    name = "cpu"

    def supports(self, sig: OpSignature) -> Support:
        return Support.yes("torch on the host")


class RmsNorm(CpuOp):
    """The whole norm in one call; bfloat16 is rounded once, after the weight, not before it too."""

    op = "rms_norm"

    def __call__(self, *args: Any) -> Any:
        x, weight, eps = args
        return F.rms_norm(x, weight.shape, weight, eps)


class Rope(CpuOp):
    """Query and key turn together: half the calls of the reference, bit-equal to it."""

    op = "rope"

    def __init__(self) -> None:
        self._seen: tuple[Any, ...] = ()
        self._factors: tuple[Tensor, Tensor] | None = None

    def __call__(self, *args: Any) -> Any:
        query, key, positions, cos_sin = args
        heads, size = query.shape[1], cos_sin.shape[1]
        cos, sin = self._of_step(positions, cos_sin, query.dtype)
        both = torch.cat((query, key), dim=1)  # [tokens, heads + kv_heads, head_dim]
        turned = both[..., :size]
        swapped = turned.view(*both.shape[:2], 2, size // 2).flip(2).view(turned.shape)
        turned.mul_(cos).add_(swapped.mul_(sin))
        return both[:, :heads], both[:, heads:]

    def _of_step(
        self, positions: Tensor, cos_sin: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Cosines and signed sines, each `[tokens, 1, rotary_dim]`: all layers of a step ask for
        the same. Both tensors are held, so that no other can come to lie at their addresses."""
        seen = (
            positions.data_ptr(),
            positions._version,
            positions.shape,
            cos_sin.data_ptr(),
            dtype,
        )
        if self._factors is None or self._seen[2:] != seen:
            row = cos_sin.index_select(0, positions[0]).to(dtype).unsqueeze(1)
            cos, sin = row.chunk(2, dim=-1)
            self._factors = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
            self._seen = (positions, cos_sin, *seen)
        return self._factors


class GatedActivation(CpuOp):
    """The activation's own result is multiplied in place: one pass over memory less."""

    def __init__(self, op: str, activation: Callable[[Tensor], Tensor]) -> None:
        self.op = op
        self._activation = activation

    def __call__(self, *args: Any) -> Any:
        gate, up = args[0].chunk(2, dim=-1)
        return self._activation(gate).mul_(up)


def cpu_ops() -> dict[str, list[OpImpl]]:
    impls: list[OpImpl] = [
        Linear(),
        RmsNorm(),
        Rope(),
        GatedActivation("silu_mul", F.silu),
        GatedActivation("gelu_mul", F.gelu),
        GatedActivation("gelu_tanh_mul", functools.partial(F.gelu, approximate="tanh")),
    ]
    return {impl.op: [impl] for impl in impls}
