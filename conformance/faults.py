"""The platform under test with a fault put into the work of its devices: a step that raises, a
device that is lost. It is raised inside the platform's own code, which has to carry it on."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..platforms.interface import Device, Event
from .base import Subject

_numbers = itertools.count()


@dataclass
class Fault:
    """What goes wrong from now on; may be changed at any time.

    `fail_once`: what the next work raises on the device's queue. `in_work` makes the exception that
    all work raises there.
    """

    fail_once: Exception | None = None
    in_work: Callable[[], Exception] | None = None


def with_fault(subject: Subject, fault: Fault) -> Subject:
    """The same platform, whose devices do as `fault` says; in this process only."""
    platform: Any = subject.cls

    class Faulty(platform):
        def open(self, device: int = 0, num_threads: int | None = None) -> Device:
            opened: Device = super().open(device, num_threads)
            _spoil(opened, fault)
            return opened

    name = f"Faulty{next(_numbers)}"
    setattr(sys.modules[__name__], name, Faulty)
    return dataclasses.replace(subject, reference=f"{__name__}:{name}")


def _spoil(device: Device, fault: Fault) -> None:
    """The object itself is changed, because a platform's own parts may ask for its class."""
    launch = device.launch

    def spoiled_launch(work: Callable[[], None]) -> Event:
        def spoiled() -> None:
            error, fault.fail_once = fault.fail_once, None
            if error is not None:
                raise error
            if fault.in_work is not None:
                raise fault.in_work()
            work()

        return launch(spoiled)

    vars(device).update(launch=spoiled_launch)
