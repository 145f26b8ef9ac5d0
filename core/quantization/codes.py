"""Weights to codes and back, in the canonical forms that `platforms.compute` describes.

Everything goes by chunks of rows that stay in a core's cache, so that a weight is never there in
fp32 as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from ...platforms.interface import FP8, INT8
from .scheme import FLOAT8, WeightScheme

CHUNK = 1 << 19
"""Elements that are quantized at once."""

CLIPPING = (1.0, 0.95, 0.9, 0.85)
"""Shares of a group's range that int4 tries. What lies outside is off by more, all else by less;
by the sum of squares that lowers the error of normally distributed weights by a twentieth."""


class NotFiniteError(ValueError):
    """`row` holds a NaN or an infinity, which no code stands for."""

    def __init__(self, row: int) -> None:
        super().__init__(f"row {row} is not finite")
        self.row = row


def largest_of_rows(weight: Tensor) -> Tensor:
    """fp32 `[out]`: the largest magnitude in each row of `[out, in]`; NaN where the row has one."""
    low, high = torch.aminmax(weight, dim=1)
    return torch.maximum(-low, high).float()


def quantize(
    weight: Tensor,
    scheme: WeightScheme,
    tensors: Mapping[str, Tensor],
    largest: Tensor | None = None,
) -> None:
    """Fill the canonical `tensors` of `scheme` from `weight` `[out, in]`. `largest`: that of each
    row, where the rows of this weight are parts of longer ones. Raises NotFiniteError."""
    for rows, made in _by_chunks(weight, scheme, largest):
        for name, part in made.items():
            tensors[name][rows].copy_(part)


def round_trip(
    weight: Tensor, scheme: WeightScheme, target: Tensor, largest: Tensor | None = None
) -> None:
    """As `quantize`, and back: `target`, which may be `weight`, gets the values of the codes."""
    for rows, made in _by_chunks(weight, scheme, largest):
        target[rows].copy_(dequantize(made))


def dequantize(tensors: Mapping[str, Tensor]) -> Tensor:
    """fp32 `[out, in]` from canonical tensors."""
    codes, scales = tensors["codes"], tensors["scales"]
    if "zeros" not in tensors:
        return codes.float().mul_(scales.unsqueeze(1))
    grouped = codes.float().view(*scales.shape, -1)
    grouped.sub_(tensors["zeros"].float().unsqueeze(2)).mul_(scales.unsqueeze(2))
    return grouped.view(codes.shape)


def _by_chunks(
    weight: Tensor, scheme: WeightScheme, largest: Tensor | None
) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    step = max(1, CHUNK // weight.shape[1])
    for first in range(0, len(weight), step):
        rows = slice(first, first + step)
        part = weight[rows].float()
        if scheme.by_row:
            most = largest_of_rows(part) if largest is None else largest[rows]
            made = BY_ROW[scheme.format](part, most)
        else:
            made = _int4(part, scheme.group)
        finite = made["scales"].isfinite().view(len(part), -1).all(1)
        if not finite.all():
            raise NotFiniteError(first + int(finite.logical_not().nonzero()[0]))
        yield rows, made


def _int8(weight: Tensor, largest: Tensor) -> dict[str, Tensor]:
    scales = largest / 127
    codes = (weight / _divisor(scales).unsqueeze(1)).round_().clamp_(-127, 127)
    return {"codes": codes.to(torch.int8), "scales": scales}


def _fp8(weight: Tensor, largest: Tensor) -> dict[str, Tensor]:
    most = torch.finfo(FLOAT8).max
    scales = largest / most
    codes = (weight / _divisor(scales).unsqueeze(1)).clamp_(-most, most)
    return {"codes": codes.to(FLOAT8), "scales": scales}


BY_ROW = {INT8: _int8, FP8: _fp8}


def _int4(weight: Tensor, group: int) -> dict[str, Tensor]:
    """Per group the clipping whose squared error is least; the range always contains 0, so that a
    zero stays one."""
    grouped = weight.view(-1, group)
    low, high = torch.aminmax(grouped, dim=1, keepdim=True)
    low, high = low.clamp_(max=0), high.clamp_(min=0)
    scales, zeros, least = None, None, None
    for share in CLIPPING:
        # Divided first: the width of a range may be more than the largest number.
        scale = high * (share / 15) - low * (share / 15)
        zero = (low * -share / _divisor(scale)).round_().clamp_(0, 15)
        values = _steps(grouped, scale, zero).mul_(scale)
        error = torch.linalg.vector_norm(values.sub_(grouped), dim=1, keepdim=True)
        if scales is None or zeros is None or least is None:
            scales, zeros, least = scale, zero, error
            continue
        better = error < least
        scales, zeros = torch.where(better, scale, scales), torch.where(better, zero, zeros)
        least = torch.minimum(least, error)
    assert scales is not None and zeros is not None
    codes = _steps(grouped, scales, zeros).add_(zeros)
    groups = (len(weight), -1)
    return {
        "codes": codes.to(torch.uint8).view(weight.shape),
        "scales": scales.view(groups),
        "zeros": zeros.to(torch.uint8).view(groups),
    }


def _steps(grouped: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Codes less their zero, as floats."""
    return (grouped / _divisor(scale)).round_().clamp_(-zero, 15 - zero)


def _divisor(scale: Tensor) -> Tensor:
    """`scale`, and 1 where that is 0: the codes of zeros are zeros."""
    return torch.where(scale == 0, 1.0, scale)
