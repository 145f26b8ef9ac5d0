"""Linear layers with weights in 8 and 4 bits by the native kernels, and their packed layouts.

The kernels of `int8` and `int4` round each token to int8 as well (W8A8, W4A8), so that all products
are of integers and their sums exact; a token that holds a NaN or an infinity comes out as NaN. That
of `w4a16` reads the layout of int4 and multiplies in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels_cpu.library import VERSION, Call, library
from .cpu_dense import PANEL
from .cpu_native import Operand
from .host_device import huge_pages
from .interface import INT4, INT8, W4A16, PackedWeight, WeightPacker
from .ops import int4_group

NATIVE_INT8 = "native_int8"
"""Format of int8 weights in panels (csrc/codes.h): codes, scales of the outputs, and -128 times
the sum of each output's codes; edges are filled up with zeros."""
NATIVE_INT4 = "native_int4"
"""Format of int4 weights in panels: two codes a byte, scales and zeros of the groups."""
NATIVE_W4A16 = "native_w4a16"
"""The same layout, for activations that are not rounded (csrc/quantized_wide.h)."""
DEPTH = 64
"""Inputs that a panel of int8 is filled up to a multiple of."""
RUN = 32
"""Inputs that int4 multiplies at once: a group is so many or a multiple."""
MOST_INPUTS = 1 << 16
"""So many products of codes are summed in 32 bits, and a tile of tokens fits the scratch."""


class CpuInt8Packer(WeightPacker):
    format = INT8
    layout = f"{NATIVE_INT8}-{VERSION}"

    def pack(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> PackedWeight:
        """Raises ValueError where there are more than MOST_INPUTS inputs."""
        _check_inputs(shape)
        codes = _rows(tensors["codes"])
        outputs, inputs = _up(shape[0], PANEL), _up(shape[1], DEPTH)
        packed = huge_pages((outputs * inputs,), torch.int8)
        scales = torch.zeros(outputs)
        scales[: shape[0]] = tensors["scales"]
        corrections = torch.empty(outputs, dtype=torch.int32)
        native = library()
        call = native.call("pack_int8", torch.int8)
        call.input[0] = codes.data_ptr()
        call.output[0:2] = [packed.data_ptr(), corrections.data_ptr()]
        call.n[0:3] = [*shape, codes.stride(0)]
        native.run_one(call)
        made = (packed, scales, corrections)
        return PackedWeight(NATIVE_INT8, shape, made, self.packed_bytes(torch.int8, shape))

    def packed_bytes(self, dtype: torch.dtype, shape: tuple[int, int]) -> int:
        return _up(shape[0], PANEL) * (_up(shape[1], DEPTH) + 4 + 4)


class CpuInt4Packer(WeightPacker):
    format = INT4
    layout = f"{NATIVE_INT4}-{VERSION}"
    _made = NATIVE_INT4

    def pack(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> PackedWeight:
        """Raises ValueError where there are more than MOST_INPUTS inputs, or groups of a size that
        is no multiple of RUN."""
        _check_inputs(shape)
        out_features, in_features = shape
        group = in_features // tensors["scales"].shape[1]
        if group % RUN:
            raise ValueError(
                f"int4 weights with groups of {group} inputs are not multiplied here: a group must "
                f"be a multiple of {RUN}."
            )
        codes = _rows(tensors["codes"])
        outputs = _up(out_features, PANEL)
        packed = huge_pages((outputs * in_features // 2,), torch.uint8)
        native = library()
        call = native.call("pack_int4", torch.int8)
        call.input[0], call.output[0] = codes.data_ptr(), packed.data_ptr()
        call.n[0:3] = [*shape, codes.stride(0)]
        native.run_one(call)
        made = (packed, _by_panels(tensors["scales"]), _by_panels(tensors["zeros"]))
        return PackedWeight(self._made, shape, made, _int4_bytes(shape, group))

    def packed_bytes(self, dtype: torch.dtype, shape: tuple[int, int]) -> int:
        """Of a weight quantized at load."""
        return _int4_bytes(shape, int4_group(shape[1]) or RUN)


class CpuW4A16Packer(CpuInt4Packer):
    format = W4A16
    layout = f"{NATIVE_W4A16}-{VERSION}"
    _made = NATIVE_W4A16


class Int8Linear:
    """int8 weights by tokens rounded to int8; see `cpu_dense.LinearKernel`."""

    kernel = "linear_int8"

    def fill(
        self, call: Call, y: Operand, x: Operand, weight: PackedWeight, bias: Tensor | None
    ) -> None:
        call.input[0:4] = [x.address, *(tensor.data_ptr() for tensor in weight.tensors)]
        call.input[4] = None if bias is None else bias.data_ptr()
        call.output[0] = y.address
        call.n[0:4] = [*weight.shape, x.strides[0], y.strides[0]]


class Int4Linear(Int8Linear):
    """int4 weights by tokens rounded to int8."""

    kernel = "linear_int4"

    def fill(
        self, call: Call, y: Operand, x: Operand, weight: PackedWeight, bias: Tensor | None
    ) -> None:
        super().fill(call, y, x, weight, bias)
        call.n[4] = weight.shape[1] // weight.tensors[1].shape[1]


class WideInt4Linear(Int4Linear):
    """int4 weights by tokens as they are, in fp32."""

    kernel = "linear_int4_wide"


def _check_inputs(shape: tuple[int, int]) -> None:
    if shape[1] > MOST_INPUTS:
        raise ValueError(
            f"A linear layer with {shape[1]} inputs is not multiplied by codes, only up to "
            f"{MOST_INPUTS}; keep it unquantized."
        )


def _rows(codes: Tensor) -> Tensor:
    return codes if codes.stride(1) == 1 else codes.contiguous()


def _up(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple


def _by_panels(numbers: Tensor) -> Tensor:
    """`[out, groups]` -> `[panels, groups, PANEL]`, filled up with zeros."""
    filled = F.pad(numbers, (0, 0, 0, -len(numbers) % PANEL))
    return filled.view(-1, PANEL, numbers.shape[1]).transpose(1, 2).contiguous()


def _int4_bytes(shape: tuple[int, int], group: int) -> int:
    return _up(shape[0], PANEL) * (shape[1] // 2 + shape[1] // group * (4 + 1))
