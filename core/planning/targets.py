"""What a plan can be made for: devices that are here, and those that a platform describes."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ...platforms.interface import (
    Capabilities,
    DeviceInfo,
    DeviceSpec,
    MemoryInfo,
    Platform,
    Probe,
    Roofline,
)
from ...platforms.registry import Candidate, available, choose
from ..errors import PlatformError
from ..platform import make_platform

logger = logging.getLogger("trimaran.plan")

ALL = "all"

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Target:
    """One device of one platform. `memory.total` 0: not known. `roofline` None: likewise."""

    platform: Platform
    index: int
    title: str
    present: bool
    capabilities: Capabilities
    memory: MemoryInfo
    roofline: Roofline | None

    @classmethod
    def of_present(cls, platform: Platform, info: DeviceInfo) -> Target:
        """Raises what `capabilities` raises; the rest may be unknown."""
        return cls(
            platform=platform,
            index=info.index,
            title=info.name,
            present=True,
            capabilities=platform.capabilities(info.index),
            memory=_guarded(
                lambda: _memory_of(platform, info), _unopened(info), f"memory of {info.name}"
            ),
            roofline=_guarded(
                lambda: platform.roofline(info.index), None, f"roofline of {info.name}"
            ),
        )

    @classmethod
    def of_described(cls, platform: Platform, spec: DeviceSpec) -> Target:
        return cls(
            platform=platform,
            index=0,
            title=spec.title,
            present=False,
            capabilities=spec.capabilities,
            memory=MemoryInfo(spec.memory, spec.memory, {}),
            roofline=spec.roofline,
        )


def find_targets(platform: str = "auto", device: str | None = None) -> list[Target]:
    """`platform` `auto`: every one that is here, or that describes a `device` of that name.
    `device`: an index, a name from `Platform.known_devices`, `all` of those, or None: every device
    that is here. PlatformError lists what there is."""
    if device is None or device.isdigit():
        found = _present(platform, None if device is None else int(device))
    else:
        found = _described(platform, device)
    targets = [one for make, what in found if (one := _guarded(make, None, what)) is not None]
    if not targets:
        names = ", ".join(what for _, what in found)
        raise PlatformError(f"Nothing is known of {names}: the log says why.", param="device")
    return targets


Found = list[tuple[Callable[[], Target], str]]
"""What makes a target, which may fail, and words for it."""


def _present(name: str, index: int | None) -> Found:
    if name != "auto":
        platforms = [make_platform(name)]
    else:
        classes = [one.cls for one in available() if one.usable and one.cls is not None]
        made = [_guarded(cls, None, f"platform {cls.name}") for cls in classes]
        platforms = [platform for platform in made if platform is not None]
    found: Found = []
    for platform in platforms:
        probe = _guarded(platform.probe, Probe(0, ""), f"devices of {platform.name}")
        found += [
            (functools.partial(Target.of_present, platform, info), f"device {info.name}")
            for info in probe.devices
            if index is None or info.index == index
        ]
    if not found:
        wanted = "device" if index is None else f"device {index}"
        raise PlatformError(f"Platform {name!r} has no {wanted} here.", param="device")
    return found


def _described(name: str, device: str) -> Found:
    """Over all platforms that could be loaded, whether they are usable here or not: only those
    whose device is asked for are made."""
    known: list[tuple[type[Platform], DeviceSpec]] = []
    for cls in _classes(name):
        specs: Sequence[DeviceSpec] = _guarded(cls.known_devices, (), f"devices of {cls.name}")
        known += [(cls, spec) for spec in specs]
    found: Found = [
        (functools.partial(_describe, cls, spec), f"device {spec.name}")
        for cls, spec in known
        if device == ALL or device.lower() in (spec.name.lower(), spec.title.lower())
    ]
    if not found:
        names = ", ".join(sorted(spec.name for _, spec in known)) or "none"
        raise PlatformError(
            f"No platform describes a device {device!r}. Described: {names}.", param="device"
        )
    return found


def _describe(cls: type[Platform], spec: DeviceSpec) -> Target:
    return Target.of_described(cls(), spec)


def _classes(name: str) -> list[type[Platform]]:
    if ":" in name:
        return [choose(name)]
    candidates: list[Candidate] = available()
    return [
        candidate.cls
        for candidate in candidates
        if candidate.cls is not None and name in ("auto", candidate.name)
    ]


def _memory_of(platform: Platform, info: DeviceInfo) -> MemoryInfo:
    device = platform.open(info.index)
    try:
        return device.memory()
    finally:
        device.close()


def _unopened(info: DeviceInfo) -> MemoryInfo:
    return MemoryInfo(info.memory, info.memory, {})


def _guarded(ask: Callable[[], T], otherwise: T, what: str) -> T:
    """A vendor's answer, or what is known without it: one device must not spoil the others."""
    try:
        return ask()
    except Exception as error:
        logger.warning("%s is not known: %s: %s", what, type(error).__name__, error)
        return otherwise
