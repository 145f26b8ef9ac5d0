"""What platforms with a bug derive from, and the list of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, TypeVar

from trimaran.platforms.interface import (
    Device,
)
from trimaran.platforms.strict import StrictKnobs, StrictPlatform
from trimaran.platforms.strict_device import StrictDevice

FOUND_BY: dict[str, str] = {}
"""`module:Class` → the check that must be the first to fail it."""

P = TypeVar("P", bound=type)


def bug(found_by: str) -> Callable[[P], P]:
    def register(cls: P) -> P:
        FOUND_BY[f"{cls.__module__}:{cls.__name__}"] = found_by
        return cls

    return register


class Quick(StrictPlatform):
    """Right, and without delay."""

    device_class: ClassVar[type[StrictDevice]] = StrictDevice
    delay: ClassVar[float] = 0.0

    def __init__(self) -> None:
        super().__init__(StrictKnobs(delay=self.delay))

    def open(self, device: int = 0, num_threads: int | None = None) -> Device:
        super().open(device).close()
        return self.device_class(device, self.delay)
