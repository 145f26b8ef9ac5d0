"""How the weight of one linear layer is kept."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ...platforms.interface import DENSE, FP8, INT4, INT4_GROUPS, INT8, W4A16
from ...platforms.ops import int4_group

FLOAT8 = torch.float8_e4m3fn
"""The codes of FP8."""


class TensorKind(NamedTuple):
    """Shape and element type of one canonical tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class WeightScheme:
    """A format of `platforms.compute`, and where it is of 4 bits the number of inputs that share a
    scale."""

    format: str = DENSE
    group: int = 0

    @property
    def by_row(self) -> bool:
        """Do all weights of an output share a scale?"""
        return self.format in (INT8, FP8)

    def tensors(self, shape: tuple[int, int]) -> dict[str, TensorKind]:
        """The canonical tensors of a quantized weight `[out, in]`."""
        out_features, in_features = shape
        if self.by_row:
            return {
                "codes": TensorKind(shape, torch.int8 if self.format == INT8 else FLOAT8),
                "scales": TensorKind((out_features,), torch.float32),
            }
        groups = (out_features, in_features // self.group)
        return {
            "codes": TensorKind(shape, torch.uint8),
            "scales": TensorKind(groups, torch.float32),
            "zeros": TensorKind(groups, torch.uint8),
        }

    def canonical_bytes(self, shape: tuple[int, int]) -> int:
        """What a packer that keeps the canonical tensors takes."""
        kinds = self.tensors(shape).values()
        return sum(math.prod(kind.shape) * kind.dtype.itemsize for kind in kinds)


PLAIN = WeightScheme()


class Choice(NamedTuple):
    """A scheme, and why it is not what was asked for (empty: it is)."""

    scheme: WeightScheme
    reason: str = ""


def choose_scheme(quantization: str | None, in_features: int, *, head: bool = False) -> Choice:
    """Of a layer of which this rank holds `in_features` inputs. Scores are worth 8 bits: the head
    is kept in int8 whatever the rest is (codes of FP8 are no nearer). Groups of int4 end where a
    rank's share does. Under W4A16 no activation is rounded anywhere: what cannot be in 4 bits stays
    as it is."""
    if quantization is None:
        return Choice(PLAIN)
    if quantization == FP8 and not head:
        return Choice(WeightScheme(FP8))
    better = PLAIN if quantization == W4A16 else WeightScheme(INT8)
    if quantization == INT8 or head:
        return Choice(better)
    group = int4_group(in_features)
    if group is not None:
        return Choice(WeightScheme(W4A16 if quantization == W4A16 else INT4, group))
    return Choice(
        better,
        f"linear layers with {in_features} inputs a rank are kept in "
        f"{'their own type' if better == PLAIN else INT8}, not int4: that is no multiple of "
        f"{min(INT4_GROUPS)}",
    )
