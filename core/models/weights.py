"""Where checkpoint tensors go: layers declare slots, a loader fills them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, slots=True)
class WeightSlot:
    """The place of one checkpoint tensor of `shape`: `target` takes this rank's share, which
    begins at `start` along `dim` and is as long as `target` is there. `init` is what random
    weights are."""

    name: str
    shape: tuple[int, ...]
    target: Tensor
    dim: int = 0
    start: int = 0
    init: Literal["normal", "ones"] = "normal"

    @property
    def share(self) -> tuple[slice, ...]:
        """This rank's part of the whole tensor, as an index."""
        stop = self.start + self.target.shape[self.dim]
        return (slice(None),) * self.dim + (slice(self.start, stop),)


class Layer:
    """Something with weights. Built empty; runs only after its slots are filled and `finish`."""

    children: tuple[Layer, ...] = ()

    def slots(self) -> Iterator[WeightSlot]:
        """The places to fill, its children's included."""
        for child in self.children:
            yield from child.slots()

    def finish(self) -> None:
        """Bring filled weights into the layout that their op reads."""
        for child in self.children:
            child.finish()
