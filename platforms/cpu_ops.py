"""Linear layers by the quickest road the processor has, and the other ops in fewer torch calls."""

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
WIDENED = 1 << 20  # weights made fp32 at a time: 4 MB stay in a cache until they are multiplied
DOT_ROWS = 4  # up to so many rows torch's own 16-bit dot products are quicker than widening


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
    rows = len(x)
    if padding := few_sizes(rows) - rows:  # F.pad copies even where it adds nothing
        x = F.pad(x, (0, 0, 0, padding))
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return y[:rows]


def few_sizes(rows: int) -> int:
    """`rows` rounded up, to 37 counts up to 2,048 and to multiples of 256 beyond: oneDNN compiles
    and keeps code for every count it meets, some hundred kilobytes each."""
    for step, limit in ((1, 8), (8, 64), (32, 256), (64, 1024)):
        if rows <= limit:
            return -(-rows // step) * step
    return -(-rows // 256) * 256


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

    def __init__(self) -> None:
        self._piece = torch.empty(0)

    def supports(self, sig: OpSignature) -> Support:
        if sig.dtype == torch.float32:
            return Support.yes("F.linear")
        refusal = (
            onednn_refusal() if sig.dtype == torch.bfloat16 else "oneDNN's layout is for bfloat16"
        )
        return Support.yes(f"fp32: {refusal}" if refusal else "oneDNN, weight packed once")

    def __call__(self, *args: Any) -> Any:
        x, weight, bias = args
        if weight.format == ONEDNN:
            return _onednn_linear(x, weight.tensors[0], bias)
        if x.dtype == torch.float32 or len(x) <= DOT_ROWS:
            return F.linear(x, weight.tensors[0], bias)
        return self._widened(x, weight.tensors[0], bias)

    def _widened(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """16-bit weights on a processor that multiplies fp32 only, made fp32 piece by piece."""
        width = weight.shape[1]
        height = max(1, WIDENED // width)
        if self._piece.numel() < height * width:
            self._piece = torch.empty(height * width)
        columns = x.float().t()  # with few rows, MKL is quicker this way round
        y = torch.empty(len(weight), len(x))
        for rows, out in zip(torch.split(weight, height), torch.split(y, height), strict=True):
            piece = self._piece[: rows.numel()].view(rows.shape).copy_(rows)
            torch.mm(piece, columns, out=out)
        if bias is not None:
            y.add_(bias.unsqueeze(1))
        return y.t().to(x.dtype, memory_format=torch.contiguous_format)


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
