"""Mixtures of experts by the native kernel, which reads what the packers of linear layers make."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..kernels_cpu.library import Call
from .cpu_dense import NATIVE
from .cpu_native import NativeOp, Operand
from .cpu_quantized import NATIVE_INT4, NATIVE_INT8, NATIVE_W4A16
from .interface import DENSE, INT4, INT8, W4A16, OpSignature, Output, PackedWeight, Support

AREAS, LINE = 6, 64
"""Parts of the scratch memory, and the bytes that each is aligned to (`Moe` in csrc/moe.h)."""
FORMATS = (NATIVE, NATIVE_INT8, NATIVE_INT4, NATIVE_W4A16)
"""Of packed weights, by the kernel's numbers (`Packed` in csrc/moe.h)."""


class NativeMoe(NativeOp):
    """Rows sorted by expert; both weights in one format."""

    op = kernel = "moe"
    tensors = (0, 1)
    reads_weights = True

    def supports(self, sig: OpSignature) -> Support:
        if sig.weight_format not in (DENSE, INT8, INT4, W4A16):
            return Support.no(f"no kernel for {sig.weight_format} weights")
        return super().supports(sig)

    def outputs(self, args: Sequence[Any]) -> Sequence[Output]:
        return [Output(tuple(args[0].shape), args[0].dtype)]

    def row_scratch(self, args: Sequence[Any], made: Sequence[Output]) -> int:
        _, _, gate_up, down, top_k, _ = args
        hidden, width = gate_up.shape[1], down.shape[1]
        sorted_rows = (hidden + width) * made[0].dtype.itemsize
        return int(top_k * (12 + sorted_rows) + 4 * (down.shape[0] // hidden + 1) + AREAS * LINE)

    def fill(self, call: Call, out: Sequence[Operand], args: Sequence[Any]) -> None:
        x, scores, gate_up, down, top_k, renormalize = args
        result, scratch = out
        call.input[:2] = x.address, scores.address
        for first, weight in ((2, gate_up), (5, down)):
            for index, tensor in enumerate(weight.tensors, first):
                call.input[index] = tensor.data_ptr()
        call.output[:2] = result.address, scratch.address
        call.n[:5] = x.shape[0], down.shape[1], scores.shape[0], top_k, renormalize
        call.n[5:8] = x.strides[0], scores.strides[0], result.strides[0]
        call.n[8:11] = FORMATS.index(gate_up.format), _group(gate_up), _group(down)


def _group(weight: PackedWeight) -> int:
    """Inputs that share a scale in a weight of int4."""
    if weight.format not in (NATIVE_INT4, NATIVE_W4A16):
        return 0
    groups: int = weight.tensors[1].shape[1]
    return weight.shape[1] // groups
