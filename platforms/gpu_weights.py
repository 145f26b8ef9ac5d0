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
    FP8,
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
FLOAT8_ROWS = "float8_rows"
"""Format of fp8 weights: codes `[out, in]` in the encoding of the card, and fp32 scales `[out]`."""
CODED = (TRITON_INT8, FLOAT8_ROWS)
TRITON_INT4 = "triton_int4"
"""Format of int4 weights: two codes a byte, fp32 scales and zeros by group (`gemm.Int4`)."""
HALVES = (torch.float16, torch.bfloat16)


class Int8Packer(WeightPacker):
    format = INT8
    layout = f"{TRITON_INT8}-1"

    def pack(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> PackedWeight:
        codes, scales = tensors["codes"].contiguous(), tensors["scales"].float().contiguous()
        return PackedWeight(TRITON_INT8, shape, (codes, scales))


class Float8Packer(WeightPacker):
    """`kind`: the encoding of e4m3 that the card's matrix units read."""

    format = FP8

    def __init__(self, kind: torch.dtype) -> None:
        self._kind = kind
        self.layout = f"{FLOAT8_ROWS}-{str(kind).removeprefix('torch.')}-1"

    @property
    def _other(self) -> bool:
        return self._kind == torch.float8_e4m3fnuz

    def pack(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> PackedWeight:
        codes, scales = tensors["codes"].contiguous(), tensors["scales"].float().contiguous()
        if not self._other:
            return PackedWeight(FLOAT8_ROWS, shape, (codes, scales))
        # The same bits stand for half the number, but those of -0, which mean NaN.
        bits = codes.view(torch.uint8)
        made = torch.where(bits == 0x80, 0, bits).view(self._kind), scales * 2
        return PackedWeight(FLOAT8_ROWS, shape, made, self.packed_bytes(codes.dtype, shape) or 0)

    def packed_bytes(self, dtype: torch.dtype, shape: tuple[int, int]) -> int | None:
        out_features, in_features = shape
        return out_features * (in_features + torch.float32.itemsize) if self._other else None


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


def gpu_packers(table: Table) -> Sequence[WeightPacker]:
    kind = float8_kind(table)
    float8 = () if kind is None else (Float8Packer(kind),)
    return Int8Packer(), Int4Packer(INT4), Int4Packer(W4A16), *float8


def float8_kind(table: Table) -> torch.dtype | None:
    """The encoding of e4m3 that the matrix units of `table`'s cards read; None: they read none."""
    kinds = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
    return next((kind for kind in kinds if str(kind).removeprefix("torch.") in table.fp8), None)


class QuantizedLinear(OpImpl):
    """x in 16 or 32 bits by int8 and fp8 weights, rounded as they are itself (W8A8), or in 16 bits
    by int4 weights (W4A16)."""

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
        codes, scales = quantize_tokens(x, weight.tensors[0].dtype, self._table)
        return self.multiply(codes, scales, weight, bias, x.dtype)

    def code_dtype(self, weight: PackedWeight) -> torch.dtype | None:
        """What x is rounded to before it is multiplied by `weight`; None: it is not."""
        kind: torch.dtype = weight.tensors[0].dtype
        return kind if weight.format in CODED else None

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
    """Experts with dense, int8 or fp8 (W8A8), or int4 (W4A16) weights."""

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
    if sig.weight_format not in (INT8, FP8, INT4, W4A16):
        return Support.no(f"no kernel for {sig.weight_format} weights")
    if sig.weight_format == FP8 and float8_kind(table) is None:
        return Support.no(f"{table.architecture} multiplies no float8")
    if sig.weight_format in (INT4, W4A16) and sig.dtype not in HALVES:
        return Support.no(f"int4 weights want activations in 16 bits, not {sig.dtype}")
    return Support.yes(f"portable, tuned for {table.architecture}")


def experts_of(weight: PackedWeight) -> moe.Experts:
    if weight.format in CODED:
        return moe.Coded(*weight.tensors)
    if weight.format == TRITON_INT4:
        return gemm.Int4(*weight.tensors)
    dense: Tensor = weight.tensors[0]
    return dense
