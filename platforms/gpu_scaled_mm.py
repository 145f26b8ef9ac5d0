"""Linear layers in FP8 by torch's scaled product: cuBLAS or CUTLASS, hipBLASLt."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from ..kernels_cuda.portable.quantize import quantize_tokens
from ..kernels_cuda.portable.tuning import Table
from .interface import FP8, OpImpl, OpSignature, Support

ROWWISE = ("sm_89", "sm_90", "sm_100", "sm_103", "gfx942", "gfx950")
"""Architectures on which it takes a scale a token and a scale an output: torch's CUDA source
(`ScaledBlas.cpp`, `RowwiseScaledMM.cu`; sm_110 and sm_120 came later, and not every build has
them) and, for AMD, pull request 144432 with hipBLASLt's "Data type support"."""
GRAIN = 16
"""Inputs and outputs are multiples of it (`ScaledBlas.cpp`)."""


class ScaledMm(OpImpl):
    """x in bfloat16, rounded to FP8 by token, by FP8 weights as `Float8Packer` lays them out.

    bfloat16 alone: it is what every row-wise kernel gives; float16 and fp32 some. It ranks above
    the portable kernel as the vendors' own code; which one is faster has not been measured."""

    op = "linear"
    name = "scaled_mm"
    priority = 20

    def __init__(self, table: Table, cards: Collection[str]) -> None:
        self._table = table
        self._cards = frozenset(cards)

    def supports(self, sig: OpSignature) -> Support:
        if reason := self._refusal(sig):
            return Support.no(reason)
        return Support.yes("torch's scaled product, a scale a token and an output")

    def _refusal(self, sig: OpSignature) -> str:
        if sig.weight_format != FP8:
            return f"it reads fp8 weights, not {sig.weight_format}"
        if not self._cards <= set(ROWWISE):
            return (
                f"row-wise scales on {', '.join(sorted(self._cards - set(ROWWISE)))} are not safe"
            )
        if not self._cards:
            return "no card is known to take row-wise scales"
        if sig.dtype != torch.bfloat16:
            return f"row-wise scales give bfloat16 everywhere, {sig.dtype} not"
        odd = [f"{name} {size}" for name, size in sig.sizes.items() if size % GRAIN]
        return f"{', '.join(odd)}: it takes multiples of {GRAIN}" if odd else ""

    def __call__(self, *args: Any) -> Any:
        x, weight, bias = args
        codes, scales = weight.tensors
        rounded, steps = quantize_tokens(x, codes.dtype, self._table)
        return torch._scaled_mm(
            rounded,
            codes.t(),  # its columns are contiguous, as the kernels want them
            scale_a=steps.unsqueeze(1),
            scale_b=scales.unsqueeze(0),
            bias=bias,
            out_dtype=x.dtype,
        )
