"""Quantized weights on a GPU: their layouts, and the linear layers and experts that read them, by
the portable Triton kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels_cuda.portable import gemm, moe
from ..kernels_cuda.portable.quantize import quantize_tokens
from ..kernels_cuda.portable.tuning import Table
from .interface import (
    DENSE,
    INT4,
    INT8,
    W4A16,
    OpImpl,
    OpSignature,
    PackedWeight,
    Support,
    WeightPacker,
)
from .ops import int4_group

TRITON_INT8 = "triton_int8"
"""Format of int8 weights: codes `[out, in]` and fp32 scales `[out]`, as canonical."""
TRITON_INT4 = "triton_int4"
"""Format of int4 weights: two codes a byte, fp32 scales and zeros by group (`gemm.Int4`)."""
HALVES = (torch.float16, torch.bfloat16)


class Int8Packer(WeightPacker):
    format = INT8
    layout = f"{TRITON_INT8}-1"

    def pack(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> PackedWeight:
        codes, scales = tensors["codes"].contiguous(), tensors["scales"].float().contiguous()
        return PackedWeight(TRITON_INT8, shape, (codes, scales))


class Int4Packer(WeightPacker):
    """Of both formats with 4 bits: activations are never rounded."""

    def __init__(self, format: str) -> None:
        self.format = format
        self.layout = f"{TRITON_INT4}-1"

    def pack(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> PackedWeight:
        """ValueError for groups of other sizes than the kernels know."""
        packed = gemm.pack_int4(tensors["codes"], tensors["scales"], tensors["zeros"])
        size = sum(part.numel() * part.element_size() for part in packed)
        return PackedWeight(TRITON_INT4, shape, tuple(packed), size)

    def packed_bytes(self, dtype: torch.dtype, shape: tuple[int, int]) -> int | None:
        out_features, in_features = shape
        group = int4_group(in_features)
        if group is None:
            return None
        scale_and_zero = torch.float32.itemsize + torch.uint8.itemsize
        return out_features * (in_features // 2 + in_features // group * scale_and_zero)


def gpu_packers() -> Sequence[WeightPacker]:
    return Int8Packer(), Int4Packer(INT4), Int4Packer(W4A16)


class QuantizedLinear(OpImpl):
    """x in 16 or 32 bits by int8 weights, rounded to int8 itself (W8A8), or in 16 bits by int4
    weights (W4A16)."""

    op = "linear"
    name = "triton"
    priority = 10

    def __init__(self, table: Table) -> None:
        self._table = table

    def supports(self, sig: OpSignature) -> Support:
        return supports_weights(sig, self._table)

    def __call__(self, *args: Any) -> Any:
        x, weight, bias = args
        x = x.contiguous()
        if weight.format == TRITON_INT4:
            return gemm.matmul_int4(x, gemm.Int4(*weight.tensors), bias, self._table)
        codes, scales = quantize_tokens(x, torch.int8, self._table)
        return self.multiply(codes, scales, weight, bias, x.dtype)

    def code_dtype(self, weight: PackedWeight) -> torch.dtype | None:
        """What x is rounded to before it is multiplied by `weight`; None: it is not."""
        return torch.int8 if weight.format == TRITON_INT8 else None

    def multiply(
        self,
        codes: Tensor,
        scales: Tensor,
        weight: PackedWeight,
        bias: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """The product of an x that is rounded already: codes `[tokens, in]` of `code_dtype`, a
        scale a token, fp32 `[tokens]`; in `dtype`."""
        theirs, steps = weight.tensors
        return gemm.matmul_scaled(codes, theirs, scales, steps, bias, self._table, dtype=dtype)


class TritonMoe(OpImpl):
    """Experts with dense, int8 (W8A8) or int4 (W4A16) weights."""

    op = "moe"
    name = "triton"
    priority = 10

    def __init__(self, table: Table) -> None:
        self._table = table

    def supports(self, sig: OpSignature) -> Support:
        if sig.weight_format == DENSE and sig.dtype in (torch.float32, *HALVES):
            return Support.yes(f"portable, tuned for {self._table.architecture}")
        return supports_weights(sig, self._table)

    def __call__(self, *args: Any) -> Any:
        x, scores, gate_up, down, top_k, renormalize = args
        return moe.moe(
            x, scores, experts_of(gate_up), experts_of(down), top_k, renormalize, self._table
        )


def supports_weights(sig: OpSignature, table: Table) -> Support:
    """Are weights of this format multiplied by activations of this dtype?"""
    if sig.weight_format == DENSE:
        return Support.no("dense weights are torch's")
    if sig.weight_format not in (INT8, INT4, W4A16):
        return Support.no(f"no kernel for {sig.weight_format} weights")
    if sig.weight_format != INT8 and sig.dtype not in HALVES:
        return Support.no(f"int4 weights want activations in 16 bits, not {sig.dtype}")
    return Support.yes(f"portable, tuned for {table.architecture}")


def experts_of(weight: PackedWeight) -> moe.Experts:
    if weight.format == TRITON_INT8:
        return moe.Coded(*weight.tensors)
    if weight.format == TRITON_INT4:
        return gemm.Int4(*weight.tensors)
    dense: Tensor = weight.tensors[0]
    return dense
