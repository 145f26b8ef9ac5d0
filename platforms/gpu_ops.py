"""Ops on a GPU: by the portable kernels, and by torch's own in fewer launches than their
references. Nothing here waits for the device or keeps a tensor from one call to the next, so that a
step can be captured."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F

from ..kernels_cuda.portable.tuning import Table
from .gpu_kernels import portable_ops, triton_missing
from .interface import DENSE, OpImpl, OpSignature, Support
from .torch_ops import TorchOp, common_ops


class Linear(TorchOp):
    """cuBLAS or hipBLASLt through torch."""

    op = "linear"

    def supports(self, sig: OpSignature) -> Support:
        if sig.weight_format != DENSE:
            return Support.no("torch's linear reads dense weights")
        return super().supports(sig)

    def __call__(self, *args: Any) -> Any:
        x, weight, bias = args
        if weight.format != DENSE:
            raise ValueError(f"torch's linear reads dense weights, not {weight.format!r}.")
        return F.linear(x, weight.tensors[0], bias)


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


def gpu_ops(table: Table, cards: Collection[str]) -> dict[str, list[OpImpl]]:
    """By the portable kernels where Triton can be imported, and by torch. `cards`: what they are
    for, by architecture."""
    ops = torch_ops()
    for impl in () if triton_missing() else portable_ops(table, cards):
        ops.setdefault(impl.op, []).insert(0, impl)
    return ops


def torch_ops() -> dict[str, list[OpImpl]]:
    """By torch alone."""
    impls: list[OpImpl] = [Linear(), Rope(), *common_ops()]
    return {impl.op: [impl] for impl in impls}
