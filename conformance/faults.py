"""The platform under test with a fault put into its devices: a step that raises, a device that is
lost, memory that is used up. The platform's own code is what has to carry the fault on."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..platforms.interface import Device, DeviceOutOfMemory, Event
from .base import Subject

_numbers = itertools.count()


@dataclass
class Fault:
    """What goes wrong from now on; may be changed at any time.

    `fail_once`: what the next work raises on the device's queue. `in_work` makes the exception that
    all work raises there, `in_calls` the one that every call of `launch` and `to_device` raises.
    `allocations`: after so many caches there is no memory for another. `devices` are those that
    were opened.
    """

    fail_once: Exception | None = None
    in_work: Callable[[], Exception] | None = None
    in_calls: Callable[[], Exception] | None = None
    allocations: int | None = None
    devices: list[Device] = dataclasses.field(default_factory=list)


def with_fault(subject: Subject, fault: Fault) -> Subject:
    """The same platform, whose devices do as `fault` says; in this process only."""
    platform: Any = subject.cls

    class Faulty(platform):
        def open(self, device: int = 0, num_threads: int | None = None) -> Device:
            opened: Device = super().open(device, num_threads)
            _spoil(opened, fault)
            fault.devices.append(opened)
            return opened

    name = f"Faulty{next(_numbers)}"
    setattr(sys.modules[__name__], name, Faulty)
    return dataclasses.replace(subject, reference=f"{__name__}:{name}")


def _spoil(device: Device, fault: Fault) -> None:
    """The object itself is changed, because a platform's own parts may ask for its class."""
    launch, to_device, alloc_kv = device.launch, device.to_device, device.alloc_kv

    def spoiled_launch(work: Callable[[], None]) -> Event:
        def spoiled() -> None:
            error, fault.fail_once = fault.fail_once, None
            if error is not None:
                raise error
            if fault.in_work is not None:
                raise fault.in_work()
            work()

        if fault.in_calls is not None:
            raise fault.in_calls()
        return launch(spoiled)

    def spoiled_to_device(host: Any) -> Any:
        if fault.in_calls is not None:
            raise fault.in_calls()
        return to_device(host)

    def spoiled_alloc_kv(shape: Sequence[int], dtype: Any) -> Any:
        if fault.allocations is not None:
            fault.allocations -= 1
            if fault.allocations < 0:
                raise DeviceOutOfMemory("no memory is left (a fault of the conformance kit)")
        return alloc_kv(shape, dtype)

    vars(device).update(
        launch=spoiled_launch, to_device=spoiled_to_device, alloc_kv=spoiled_alloc_kv
    )
