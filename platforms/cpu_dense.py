"""Linear layers by the native kernels, and the layout of dense weights that they read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..kernels_cpu.library import VERSION, Call, library
from .cpu_native import NativeOp, Operand
from .host_device import huge_pages
from .interface import OpSignature, Output, PackedWeight, Support, WeightPacker
from .ops import DENSE

NATIVE = "native"
"""Format of a dense weight in panels of 32 outputs (csrc/linear.h), the same for every instruction
set; edges are filled up with zeros."""
PANEL = 32


class LinearKernel(Protocol):
    """How a linear layer is called by weights of one layout."""

    kernel: str

    def fill(
        self, call: Call, y: Operand, x: Operand, weight: PackedWeight, bias: Tensor | None
    ) -> None:
        """Complete `call`; see `NativeOp.fill`."""


class DenseLinear:
    """fp32, bf16 or fp16 weights, multiplied by activations of the same type."""

    kernel = "linear_dense"

    def fill(
        self, call: Call, y: Operand, x: Operand, weight: PackedWeight, bias: Tensor | None
    ) -> None:
        out_features, in_features = weight.shape
        call.input[0] = x.address
        call.input[1] = weight.tensors[0].data_ptr()
        call.input[2] = None if bias is None else bias.data_ptr()
        call.output[0] = y.address
        call.n[0:4] = [out_features, in_features, x.strides[0], y.strides[0]]


class NativeLinear(NativeOp):
    """`kernels`: how weights are multiplied, by the format of the packed weight; `formats`: the
    canonical forms that there are packers for."""

    op = "linear"
    reads_weights = True

    def __init__(self, kernels: Mapping[str, LinearKernel], formats: Sequence[str]) -> None:
        self._kernels = kernels
        self._formats = tuple(formats)

    def supports(self, sig: OpSignature) -> Support:
        if sig.weight_format not in self._formats:
            return Support.no(f"no kernel for {sig.weight_format} weights")
        return super().supports(sig)

    def kernel_of(self, args: Sequence[Any]) -> str:
        return self._kernels[args[1].format].kernel

    def outputs(self, args: Sequence[Any]) -> Sequence[Output]:
        x, weight, _ = args
        return (Output((x.shape[0], weight.shape[0]), x.dtype),)

    def fill(self, call: Call, out: Sequence[Operand], args: Sequence[Any]) -> None:
        x, weight, bias = args
        self._kernels[weight.format].fill(call, out[0], x, weight, bias)


class NativeDensePacker(WeightPacker):
    """Any dense weight, once: the layout costs nothing but its edges."""

    format = DENSE
    layout = f"{NATIVE}-{VERSION}"

    def pack(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> PackedWeight:
        weight = tensors["weight"]
        if weight.stride(1) != 1:
            weight = weight.contiguous()
        size = self.packed_bytes(weight.dtype, shape)
        packed = huge_pages((size // weight.dtype.itemsize,), weight.dtype)
        native = library()
        call = native.call("pack_dense", weight.dtype)
        call.input[0], call.output[0] = weight.data_ptr(), packed.data_ptr()
        call.n[0:3] = [*shape, weight.stride(0)]
        native.run_one(call)
        return PackedWeight(NATIVE, shape, (packed,), size)

    def packed_bytes(self, dtype: torch.dtype, shape: tuple[int, int]) -> int:
        pairs = 2 if dtype == torch.bfloat16 else 1
        out_features, in_features = (
            math.ceil(size / multiple) * multiple
            for size, multiple in zip(shape, (PANEL, pairs), strict=True)
        )
        return out_features * in_features * dtype.itemsize
