"""Linear layers with 16-bit weights: packed once, for the quickest road the processor has.

F.linear would repack a bfloat16 weight in every call where oneDNN multiplies bfloat16, and go by a
plain loop where it does not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .host_device import onednn_multiplies_bfloat16
from .interface import OpImpl, OpSignature, PackedWeight, Support, WeightPacker
from .ops import DENSE

ONEDNN = "onednn"
"""Format of a bfloat16 weight in oneDNN's own blocked layout: an opaque tensor."""
FBGEMM = "fbgemm"
"""Format of a weight as fp16 in FBGEMM's layout: an opaque object; it is multiplied in fp32."""
# A bfloat16 of at least 2^-17 is an fp16 exactly; below, it is off by at most 2^-25. A weight whose
# largest value is in this range loses at most 2^-12 of it.
FP16_RANGE = (2.0**-13, torch.finfo(torch.float16).max)


@functools.cache
def onednn_refusal() -> str:
    """Why weights are not packed for oneDNN here; empty where they are. Tried once, for real:
    these ops are internal to torch and may be gone or changed in another version."""
    if not onednn_multiplies_bfloat16():
        return "oneDNN computes no bfloat16 on this processor"
    try:
        return _wrong_result(_onednn_pack, _onednn_linear)
    except Exception as error:
        return f"oneDNN's packed linear fails here: {error}"


@functools.cache
def fbgemm_refusal() -> str:
    """As `onednn_refusal`, for FBGEMM's fp16 weights: they need AVX2 and a torch built with it."""
    try:
        return _wrong_result(_fbgemm_pack, _fbgemm_linear)
    except Exception as error:
        return f"FBGEMM's packed linear fails here: {error}"


def _wrong_result(
    pack: Callable[[Tensor], Any], linear: Callable[[Tensor, Any, Tensor | None], Tensor]
) -> str:
    """What is wrong with a small product by these two; empty if it is right."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 64, generator=generator).bfloat16()
    weight = torch.randn(96, 64, generator=generator).bfloat16()
    expected = F.linear(x.float(), weight.float())
    right = torch.allclose(linear(x, pack(weight), None).float(), expected, rtol=0.02, atol=0.1)
    return "" if right else "its packed linear gives wrong results here"


def linear_road(dtype: torch.dtype) -> str:
    """How weights of `dtype` are multiplied on this processor, and why not better: one line."""
    if dtype == torch.float32:
        return "F.linear"
    if dtype == torch.bfloat16 and not onednn_refusal():
        return "oneDNN, weights packed once"
    why = f" ({onednn_refusal()})" if dtype == torch.bfloat16 else ""
    if not fbgemm_refusal():
        return f"FBGEMM in fp32, weights packed once as fp16 where they fit{why}"
    return f"F.linear: {fbgemm_refusal()}{why}"


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


def _fbgemm_pack(weight: Tensor) -> Any:
    return torch.ops.quantized.linear_prepack_fp16(weight.float(), None)


def _fbgemm_linear(x: Tensor, packed: Any, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.quantized.linear_dynamic_fp16(x.float(), packed)
    if bias is not None:
        y.add_(bias)
    return y.to(x.dtype)


def fits_fp16(weight: Tensor) -> bool:
    """Does fp16 keep what matters of this weight? Not if it holds an infinity or a NaN."""
    low, high = torch.aminmax(weight)
    largest = max(-float(low), float(high))
    return largest == 0 or FP16_RANGE[0] <= largest <= FP16_RANGE[1]


class CpuDensePacker(WeightPacker):
    """16-bit weights go into the layout of the quickest road; the rest stays as it is."""

    format = DENSE

    def pack(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> PackedWeight:
        weight = tensors["weight"]
        if weight.dtype == torch.bfloat16 and not onednn_refusal():
            packed = _onednn_pack(weight)
            return PackedWeight(ONEDNN, shape, (packed,), _onednn_bytes(shape))
        if weight.dtype != torch.float32 and not fbgemm_refusal() and fits_fp16(weight):
            packed = _fbgemm_pack(weight)
            return PackedWeight(FBGEMM, shape, (packed,), _fbgemm_bytes(shape))
        return PackedWeight(DENSE, shape, (weight,))

    def packed_bytes(self, dtype: torch.dtype, shape: tuple[int, int]) -> int | None:
        """For FBGEMM as if the weight fitted fp16, which trained and random ones do."""
        if dtype == torch.bfloat16 and not onednn_refusal():
            return _onednn_bytes(shape)
        if dtype != torch.float32 and not fbgemm_refusal():
            return _fbgemm_bytes(shape)
        return None


def _onednn_bytes(shape: tuple[int, int]) -> int:
    """oneDNN's blocks of bfloat16: 64 outputs by 32 inputs, the edges filled up."""
    return _rounded(shape[0], 64) * _rounded(shape[1], 32) * 2


def _fbgemm_bytes(shape: tuple[int, int]) -> int:
    """FBGEMM's fp16 panels (`PackedGemmMatrixB`, fbgemm/FbgemmPackMatrixB.h): 16 outputs by 512
    inputs, the edges filled up."""
    return _rounded(shape[0], 16) * _rounded(shape[1], 512) * 2


def _rounded(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


class Linear(OpImpl):
    op = "linear"
    name = "cpu"

    def supports(self, sig: OpSignature) -> Support:
        return Support.yes(linear_road(sig.dtype))

    def __call__(self, *args: Any) -> Any:
        x, weight, bias = args
        (packed,) = weight.tensors
        if weight.format == ONEDNN:
            return _onednn_linear(x, packed, bias)
        if weight.format == FBGEMM:
            return _fbgemm_linear(x, packed, bias)
        return F.linear(x, packed, bias)
