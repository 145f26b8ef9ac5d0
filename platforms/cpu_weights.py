"""Which linear layers and weight layouts the cpu platform has: the native ones wherever they can be
used, torch's roads otherwise. All of its linears read what its packers make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..kernels_cpu.library import unavailable
from .cpu_dense import NATIVE, DenseLinear, LinearKernel, NativeDensePacker, NativeLinear
from .cpu_linear import CpuDensePacker, Linear
from .cpu_quantized import (
    NATIVE_INT4,
    NATIVE_INT8,
    CpuInt4Packer,
    CpuInt8Packer,
    Int4Linear,
    Int8Linear,
)
from .interface import OpImpl, WeightPacker

KERNELS: Mapping[str, LinearKernel] = {
    NATIVE: DenseLinear(),
    NATIVE_INT8: Int8Linear(),
    NATIVE_INT4: Int4Linear(),
}
"""By the format of a packed weight."""


def packers() -> Sequence[WeightPacker]:
    if unavailable():
        return (CpuDensePacker(),)
    return NativeDensePacker(), CpuInt8Packer(), CpuInt4Packer()


def linear() -> OpImpl:
    return Linear() if unavailable() else NativeLinear(KERNELS, [p.format for p in packers()])
