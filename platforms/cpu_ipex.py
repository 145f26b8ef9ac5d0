"""Optional: kernels of intel-extension-for-pytorch (IPEX) where an installed one fits torch.

They serve where the native library cannot, before torch's own. Upstream retired IPEX: 2.8 was its
last release, for torch 2.8 alone. Its library is loaded when a model is first bound to it, without
its Python package, whose import takes seconds and brings in what is not needed here; `docs/ipex.md`
says what else loading it changes in a process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor

from ..kernels_cpu.library import unavailable
from . import host
from .cpu_linear import CpuDensePacker, Linear
from .host_device import huge_pages
from .interface import OpImpl, OpSignature, PackedWeight, Support
from .ops import DENSE, OPS

DISTRIBUTION = "intel-extension-for-pytorch"
LIBRARY = "intel_extension_for_pytorch/lib/libintel-ext-pt-cpu.so"
NAME, PRIORITY = "ipex", 5  # below the native kernels, above torch's
IPEX = "ipex"
"""Format of a weight in IPEX's blocks of 64 inputs by 16 outputs (`tpp_linear`): `[out / 16,
in / 64, 64 / pair, 16, pair]`, a pair being the two bfloat16 of 32 bits; of fp32, without the last
dimension. Shapes that these do not divide go by torch's roads, as IPEX does it itself."""
BLOCK = (16, 64)


@functools.cache
def misfit() -> str:
    """Why no installed IPEX fits this torch; empty where one does. Loads nothing."""
    try:
        version = metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return f"{DISTRIBUTION} is not installed"
    wanted = Version(version).release[:2]
    if wanted == Version(torch.__version__).release[:2]:
        return ""
    return (
        f"{DISTRIBUTION} {version} wants torch {'.'.join(map(str, wanted))}; "
        f"this is torch {torch.__version__}"
    )


@functools.cache
def refusal() -> str:
    """Why nothing of IPEX can be used here; empty where it can. Loads its library."""
    if reason := misfit():
        return reason
    path = metadata.distribution(DISTRIBUTION).locate_file(LIBRARY)
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"the library of {DISTRIBUTION} does not load: {error}"
    return ""


@functools.cache
def refusal_of(op: str, dtype: torch.dtype) -> str:
    """As `refusal`, for one op: a small trial of it must agree with the reference."""
    if reason := refusal():
        return reason
    if dtype not in OPS[op].tolerance:
        return f"no kernel of IPEX is used for {dtype}"
    rtol, atol = OPS[op].tolerance[dtype]
    try:
        pairs = _TRIALS[op](dtype)
    except Exception as error:
        return f"IPEX's {op} fails here: {str(error).partition(chr(10))[0]}"
    right = all(torch.allclose(*pair, rtol=rtol, atol=atol) for pair in pairs)
    return "" if right else f"IPEX's {op} gives wrong results here in {dtype}"


def about() -> str:
    """For people, without loading anything."""
    if reason := misfit():
        return reason
    return f"{metadata.version(DISTRIBUTION)}, where the native kernels cannot serve"


class IpexRmsNorm(OpImpl):
    """One pass, where IPEX has a kernel for it. Its fused sum and norm writes to its input, and is
    not used: a sum and this norm take as many passes over memory."""

    op, name, priority = "rms_norm", NAME, PRIORITY

    def supports(self, sig: OpSignature) -> Support:
        if reason := refusal_of(self.op, sig.dtype):
            return Support.no(reason)
        if "avx512f" not in host.cpu_flags():
            return Support.no("below AVX-512, IPEX's norm is made of torch's ops")
        return Support.yes("IPEX's kernel")

    def __call__(self, *args: Any) -> Any:
        x, weight, eps = args
        return torch.ops.torch_ipex.rmsnorm(x, weight, eps)


class IpexLinear(Linear):
    """Reads what `IpexDensePacker` makes, by torch's roads too."""

    name, priority = NAME, PRIORITY

    def supports(self, sig: OpSignature) -> Support:
        if not unavailable():
            return Support.no("weights are packed for the native kernels")
        if sig.weight_format != DENSE:
            return Support.no(f"no kernel of IPEX is used for {sig.weight_format} weights")
        if reason := refusal_of(self.op, sig.dtype):
            return Support.no(reason)
        return Support.yes("IPEX's kernel, weights packed once")

    def __call__(self, *args: Any) -> Any:
        x, weight, bias = args
        if weight.format != IPEX:
            return super().__call__(*args)
        (packed,), out_features = weight.tensors, weight.shape[0]
        if bias is None:
            return torch.ops.torch_ipex.tpp_linear(x.contiguous(), packed, out_features)
        return torch.ops.torch_ipex.tpp_linear_bias(x.contiguous(), packed, bias, out_features)


class LinearBesideIpex(Linear):
    """torch's roads, for the element types that IPEX does not multiply."""

    def supports(self, sig: OpSignature) -> Support:
        if not refusal_of(self.op, sig.dtype):
            return Support.no("weights are packed for IPEX")
        return super().supports(sig)


class IpexDensePacker(CpuDensePacker):
    """IPEX's blocks where it multiplies the element type and they divide the shape."""

    def pack(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> PackedWeight:
        weight = tensors["weight"]
        if _in_blocks(weight.dtype, shape):
            packed = _blocked(weight)
            return PackedWeight(IPEX, shape, (packed,), packed.nbytes)
        return super().pack(tensors, shape)

    def packed_bytes(self, dtype: torch.dtype, shape: tuple[int, int]) -> int | None:
        if _in_blocks(dtype, shape):
            return shape[0] * shape[1] * dtype.itemsize
        return super().packed_bytes(dtype, shape)


def _in_blocks(dtype: torch.dtype, shape: tuple[int, int]) -> bool:
    divided = all(size % block == 0 for size, block in zip(shape, BLOCK, strict=True))
    return divided and not refusal_of("linear", dtype)


def _blocked(weight: Tensor) -> Tensor:
    (outputs, inputs), pair = BLOCK, 4 // weight.element_size()
    rows = weight.reshape(-1, outputs, weight.shape[1] // inputs, inputs // pair, pair)
    blocks = rows.permute(0, 2, 3, 1, 4)
    packed = huge_pages(blocks.shape, weight.dtype).copy_(blocks)
    return packed.squeeze(-1) if pair == 1 else packed


# ---------------------------------------------------------------------------------------------
# Trials: what an op makes of a small input, each beside what its reference makes of it
# ---------------------------------------------------------------------------------------------

_Pairs = list[tuple[Tensor, Tensor]]


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def _linear_trial(dtype: torch.dtype) -> _Pairs:
    outputs, inputs = shape = (3 * BLOCK[0], 2 * BLOCK[1])
    x, weight = _random(3, inputs, dtype=dtype), _random(outputs, inputs, dtype=dtype)
    packed, bias = PackedWeight(IPEX, shape, (_blocked(weight),)), _random(outputs, dtype=dtype)
    linear = IpexLinear()
    return [(linear(x, packed, summand), F.linear(x, weight, summand)) for summand in (None, bias)]


def _norm_trial(dtype: torch.dtype) -> _Pairs:
    args = _random(3, 80, dtype=dtype), _random(80, dtype=dtype), 1e-6
    return [(IpexRmsNorm()(*args), OPS["rms_norm"].reference(*args))]


_TRIALS: Mapping[str, Callable[[torch.dtype], _Pairs]] = {
    "linear": _linear_trial,
    "rms_norm": _norm_trial,
}
