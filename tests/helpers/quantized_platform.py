"""Platforms that multiply by the codes of quantized weights (strict, with packers of its own), and
one that does not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trimaran.core.quantization.codes import dequantize
from trimaran.platforms.cpu import CpuPlatform
from trimaran.platforms.interface import (
    DENSE,
    FP8,
    INT4,
    INT8,
    Capabilities,
    OpImpl,
    OpSignature,
    PackedWeight,
    Support,
    WeightPacker,
)
from trimaran.platforms.strict import StrictPlatform

FORMATS = (INT8, INT4, FP8)
CALLS: dict[str, int] = {}
"""Format → how often it was multiplied by."""


class Keeping(WeightPacker):
    """Leaves canonical tensors as they are."""

    def __init__(self, format: str) -> None:
        self.format = format

    def pack(self, tensors: Mapping[str, Tensor], shape: tuple[int, int]) -> PackedWeight:
        return PackedWeight(f"kept {self.format}", shape, tuple(tensors.values()))


def values_of(weight: PackedWeight) -> Tensor:
    """fp32 `[out, in]`: what a kept weight stands for, quantized or dense."""
    names = ("codes", "scales", "zeros")
    if weight.format == "dense":
        return weight.tensors[0].float()
    return dequantize(dict(zip(names, weight.tensors, strict=False)))


def rounded(x: Tensor, format: str) -> Tensor:
    """x as it is read by codes of this format, with a scale a token."""
    float8 = format == f"kept {FP8}"
    step = x.abs().amax(-1, keepdim=True) / (448 if float8 else 127)
    codes = x / torch.where(step > 0, step, 1)
    codes = codes.to(torch.float8_e4m3fn).to(x.dtype) if float8 else codes.round()
    return codes * step


class ByCodes(OpImpl):
    """Weights as they are kept; with `rounding`, activations in 8 bits too (W8A8)."""

    op = "linear"
    name = "by codes"
    rounding = False

    def supports(self, sig: OpSignature) -> Support:
        if sig.weight_format not in FORMATS:
            return Support.no(f"{sig.weight_format} weights")
        return Support.yes()

    def __call__(self, *args: Any) -> Any:
        x, weight, bias = args
        CALLS[weight.format] = CALLS.get(weight.format, 0) + 1
        plain = values_of(weight).to(x.dtype)
        if self.rounding:
            x = rounded(x, weight.format)
        return torch.nn.functional.linear(x, plain, bias)


class Native(StrictPlatform):
    def capabilities(self, device: int = 0) -> Capabilities:
        known = super().capabilities(device)
        return Capabilities(
            known.dtypes, known.kv_dtypes, weight_formats=("dense", *FORMATS), run_ahead=1
        )

    def ops(self) -> Mapping[str, Sequence[OpImpl]]:
        ops = dict(super().ops())
        return {**ops, "linear": [ByCodes(), *ops["linear"]]}

    def weight_packers(self) -> Mapping[str, WeightPacker]:
        return {**super().weight_packers(), **{one: Keeping(one) for one in FORMATS}}


class Rounding(Native):
    """It rounds activations as the GPU hulls do."""

    def ops(self) -> Mapping[str, Sequence[OpImpl]]:
        ops = dict(super().ops())
        by_codes = ByCodes()
        by_codes.rounding = True
        return {**ops, "linear": [by_codes, *ops["linear"][1:]]}


class PlainCpu(CpuPlatform):
    """The processor, with nothing for quantized weights or caches."""

    def capabilities(self, device: int = 0) -> Capabilities:
        known = super().capabilities(device)
        floats = ("float32", "bfloat16", "float16")
        return dataclasses.replace(known, kv_dtypes=floats, weight_formats=(DENSE,))

    def weight_packers(self) -> Mapping[str, WeightPacker]:
        return {DENSE: super().weight_packers()[DENSE]}


class Refusing(Native):
    """Has packers, and a linear that reads no codes of so many inputs."""

    def ops(self) -> Mapping[str, Sequence[OpImpl]]:
        class Narrow(ByCodes):
            def supports(self, sig: OpSignature) -> Support:
                if sig.sizes["in_features"] > 128:
                    return Support.no("at most 128 inputs")
                return super().supports(sig)

        return {**super().ops(), "linear": [Narrow()]}
