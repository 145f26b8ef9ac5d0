"""Which linear layers and weight layouts the cpu platform has: the native ones wherever they can be
used, torch's roads otherwise. All of its linears read what its packers make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..kernels_cpu.library import unavailable
from .cpu_dense import NATIVE, DenseLinear, LinearKernel, NativeDensePacker, NativeLinear
from .cpu_linear import CpuDensePacker, Linear
from .interface import OpImpl, WeightPacker

KERNELS: Mapping[str, LinearKernel] = {NATIVE: DenseLinear()}
"""By the format of a packed weight."""


def packers() -> Sequence[WeightPacker]:
    return (CpuDensePacker(),) if unavailable() else (NativeDensePacker(),)


def linear() -> OpImpl:
    return Linear() if unavailable() else NativeLinear(KERNELS, [p.format for p in packers()])
