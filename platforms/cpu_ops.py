"""Linear layers through oneDNN with weights packed once, and the other ops in fewer torch calls."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .interface import OpImpl, OpSignature, PackedWeight, Support, WeightPacker
from .ops import DENSE

ONEDNN = "onednn"
"""Format of a bfloat16 weight in oneDNN's own blocked layout: an opaque tensor."""


@functools.cache
def onednn_refusal() -> str:
    """Why weights are not packed for oneDNN here; empty where they are. Tried once, for real:
    these ops are internal to torch and may be gone or changed in another version."""
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "oneDNN computes no bfloat16 on this processor"
        x, weight = torch.randn(3, 64), torch.randn(96, 64)
        x, weight = x.bfloat16(), weight.bfloat16()
        found = _onednn_linear(x, _onednn_pack(weight), None)
        if not torch.allclose(found.float(), F.linear(x, weight).float(), rtol=0.02, atol=0.1):
            return "oneDNN's packed linear gives wrong results here"
    except Exception as error:
        return f"oneDNN's packed linear fails here: {error}"
    return ""


def _onednn_pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
    return packed


def _onednn_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y


class CpuDensePacker(WeightPacker):
    """bfloat16 weights go into oneDNN's layout where that works; the rest stays as it is.

    F.linear would repack the weight in every call: at one row that is most of its time.
    """

    format = DENSE

    def pack(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> PackedWeight:
        weight = tensors["weight"]
        if weight.dtype != torch.bfloat16 or onednn_refusal():
            return PackedWeight(DENSE, shape, (weight,))
        return PackedWeight(ONEDNN, shape, (_onednn_pack(weight),))


class CpuOp(OpImpl):
    """An op of this platform that takes every size."""

    name = "cpu"

    def supports(self, sig: OpSignature) -> Support:
        return Support.yes("torch on the host")


class Linear(CpuOp):
    op = "linear"

    def supports(self, sig: OpSignature) -> Support:
        if sig.dtype != torch.bfloat16:
            return Support.yes("F.linear")
        refusal = onednn_refusal()
        return Support.yes(f"F.linear: {refusal}" if refusal else "oneDNN, weight packed once")

    def __call__(self, *args: Any) -> Any:
        x, weight, bias = args
        if weight.format == ONEDNN:
            return _onednn_linear(x, weight.tensors[0], bias)
        return F.linear(x, weight.tensors[0], bias)


class Rope(CpuOp):
    """Query and key turn together: half the calls of the reference, bit-equal to it."""

    op = "rope"

    def __call__(self, *args: Any) -> Any:
        query, key, positions, cos_sin = args
        heads, size = query.shape[1], cos_sin.shape[1]
        row = cos_sin.index_select(0, positions[0]).to(query.dtype).unsqueeze(1)
        cos, sin = row.chunk(2, dim=-1)  # each [tokens, 1, rotary_dim / 2]
        both = torch.cat((query, key), dim=1)  # [tokens, heads + kv_heads, head_dim]
        turned = both[..., :size]
        swapped = turned.view(*both.shape[:2], 2, size // 2).flip(2).view(turned.shape)
        turned.mul_(torch.cat((cos, cos), dim=-1))
        turned.add_(swapped.mul_(torch.cat((-sin, sin), dim=-1)))
        return both[:, :heads], both[:, heads:]


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
        Rope(),
        GatedActivation("silu_mul", F.silu),
        GatedActivation("gelu_mul", F.gelu),
        GatedActivation("gelu_tanh_mul", functools.partial(F.gelu, approximate="tanh")),
    ]
    return {impl.op: [impl] for impl in impls}
