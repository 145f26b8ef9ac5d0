"""Which linear layers and weight layouts the cpu platform has: the native ones wherever they can be
used, IPEX's and torch's roads otherwise. Weights are packed for one of the three, and only that one
says that it supports them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..kernels_cpu.library import unavailable
from .cpu_dense import NATIVE, DenseLinear, LinearKernel, NativeDensePacker, NativeLinear
from .cpu_ipex import IpexDensePacker, IpexLinear, LinearBesideIpex
from .cpu_quantized import (
    NATIVE_INT4,
    NATIVE_INT8,
    NATIVE_W4A16,
    CpuInt4Packer,
    CpuInt8Packer,
    CpuW4A16Packer,
    Int4Linear,
    Int8Linear,
    WideInt4Linear,
)
from .interface import OpImpl, OpSignature, WeightPacker

KERNELS: Mapping[str, LinearKernel] = {
    NATIVE: DenseLinear(),
    NATIVE_INT8: Int8Linear(),
    NATIVE_INT4: Int4Linear(),
    NATIVE_W4A16: WideInt4Linear(),
}
"""By the format of a packed weight."""


def packers() -> Sequence[WeightPacker]:
    if unavailable():
        return (IpexDensePacker(),)
    return NativeDensePacker(), CpuInt8Packer(), CpuInt4Packer(), CpuW4A16Packer()


def linear() -> OpImpl:
    """One that reads whatever the packers make."""
    return linears()[0]


def linears() -> Sequence[OpImpl]:
    if unavailable():
        return IpexLinear(), LinearBesideIpex()
    return NativeLinear(KERNELS, [packer.format for packer in packers()]), IpexLinear()


def road(dtype: torch.dtype) -> str:
    """How weights of `dtype` are multiplied on this machine, for people."""
    use = OpSignature("linear", dtype)
    return next(answer.reason for one in linears() if (answer := one.supports(use)))
