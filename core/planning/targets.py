"""What a plan can be made for: devices that are here, and those that a platform describes."""

from __future__ import annotations

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
        return cls(
            platform=platform,
            index=info.index,
            title=info.name,
            present=True,
            capabilities=platform.capabilities(info.index),
            memory=_guarded(lambda: _memory_of(platform, info), _unopened(info), "memory"),
            roofline=_guarded(lambda: platform.roofline(info.index), None, "roofline"),
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
        return _present(platform, None if device is None else int(device))
    described = _described(platform)
    found = [
        target
        for name, target in described
        if device == ALL or device.lower() in (name.lower(), target.title.lower())
    ]
    if not found:
        known = ", ".join(sorted(name for name, _ in described)) or "none"
        raise PlatformError(
            f"No platform describes a device {device!r}. Described: {known}.", param="device"
        )
    return found


def _present(name: str, index: int | None) -> list[Target]:
    if name == "auto":
        classes = [one.cls for one in available() if one.usable and one.cls is not None]
        platforms = [cls() for cls in classes]
    else:
        platforms = [make_platform(name)]
    found = [
        Target.of_present(platform, info)
        for platform in platforms
        for info in platform.probe().devices
        if index is None or info.index == index
    ]
    if not found:
        wanted = "device" if index is None else f"device {index}"
        raise PlatformError(f"Platform {name!r} has no {wanted} here.", param="device")
    return found


def _described(name: str) -> list[tuple[str, Target]]:
    """Over all platforms that could be loaded, whether they are usable here or not."""
    found = []
    for cls in _classes(name):
        specs: Sequence[DeviceSpec] = _guarded(cls.known_devices, (), f"devices of {cls.name}")
        if specs:
            platform = cls()
            found += [(spec.name, Target.of_described(platform, spec)) for spec in specs]
    return found


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
        logger.warning("the %s is not known: %s: %s", what, type(error).__name__, error)
        return otherwise
