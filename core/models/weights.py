"""Where checkpoint tensors go: layers say which they read, and fill themselves from a reader."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from .packed_cache import PackedCache


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """One checkpoint tensor of `shape`, of which this rank reads [start, stop) along `dim`. `init`
    is what random weights are."""

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    dim: int = 0
    init: Literal["normal", "ones"] = "normal"

    @property
    def share(self) -> tuple[slice, ...]:
        """This rank's part of the whole tensor, as an index."""
        return (slice(None),) * self.dim + (slice(self.start, self.stop),)

    def rows(self, first: int, last: int) -> tuple[slice, ...]:
        """Rows [first, last) of this rank's part, as an index of the whole tensor."""
        if self.dim == 0:
            return (slice(self.start + first, self.start + last),)
        return (slice(first, last), *self.share[1:])

    @property
    def numel(self) -> int:
        """Elements of this rank's part."""
        return math.prod(self.shape) // self.shape[self.dim] * (self.stop - self.start)


Read = Callable[[WeightSlot, Tensor], None]
"""Copies a slot's part into a tensor of its shape, converting on the way."""


@dataclass(frozen=True, slots=True)
class WeightSource:
    """Where `Layer.load` takes weights from. `kept`: packed ones of an earlier start."""

    read: Read
    kept: PackedCache | None = None


class Layer:
    """Something with weights. Built without them; runs only after `load`."""

    children: tuple[Layer, ...] = ()

    def slots(self) -> Iterator[WeightSlot]:
        """What `load` reads, its children's included."""
        for child in self.children:
            yield from child.slots()

    def load(self, source: WeightSource) -> None:
        """Fill the weights and bring them into the layout that their op reads, one child after
        the other: of plain weights that become packed ones, only one layer's exist at a time."""
        for child in self.children:
            child.load(source)
