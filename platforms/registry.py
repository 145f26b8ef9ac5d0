"""Discovery: which platforms there are, whether they work here, and which one to use.

Built-in platforms and those of installed packages (entry points, group `trimaran.platforms`) take
the same road: a reference `module:Class`, imported, checked and probed inside one guard. Whatever
goes wrong on it becomes the reason that `trimaran platforms` prints, never an import error.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

from .api import negotiate
from .interface import Platform, PlatformUnavailable, Probe

GROUP = "trimaran.platforms"

_BUILT_IN = (
    EntryPoint("cpu", f"{__package__}.cpu:CpuPlatform", GROUP),
    EntryPoint("strict", f"{__package__}.strict:StrictPlatform", GROUP),
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One known platform. `cls` is None where it could not even be loaded; `probe.reason` says
    why it can or cannot be used, `origin` which distribution brought it."""

    name: str
    cls: type[Platform] | None
    probe: Probe
    origin: str = ""

    @property
    def usable(self) -> bool:
        return self.cls is not None and self.probe.score > 0


def available() -> list[Candidate]:
    """Every known platform, the best first. Initialises no device and never raises."""
    found = [_examine(entry) for entry in _entries()]
    return sorted(found, key=lambda candidate: -candidate.probe.score)


def choose(name: str = "auto") -> type[Platform]:
    """The class of the platform `name`, or for `auto` of the usable one with the highest score.
    `module:Class` names a class that need not be installed: a vendor's work in progress.

    Raises `PlatformUnavailable`, listing each platform and its reason.
    """
    if ":" in name:
        return _by_reference(name)
    candidates = available()
    for candidate in candidates:
        if candidate.cls is not None and candidate.usable and name in ("auto", candidate.name):
            return candidate.cls
    asked = "No platform is usable" if name == "auto" else f"Platform {name!r} is not usable"
    lines = [f"  {c.name}: {c.probe.reason or 'usable'}" for c in candidates]
    raise PlatformUnavailable("\n".join([f"{asked} here. Known platforms:", *lines]))


def _by_reference(reference: str) -> type[Platform]:
    candidate = _examine(EntryPoint("", reference, GROUP))
    if candidate.cls is None or not candidate.usable:
        raise PlatformUnavailable(f"Platform {reference} is not usable: {candidate.probe.reason}")
    return candidate.cls


def _entries() -> Iterator[EntryPoint]:
    """Built-ins first; an installed package cannot take the name of one."""
    yield from _BUILT_IN
    taken = {entry.name for entry in _BUILT_IN}
    yield from (entry for entry in entry_points(group=GROUP) if entry.name not in taken)


def _examine(entry: EntryPoint) -> Candidate:
    origin = entry.dist.name if entry.dist is not None else "trimaran"
    try:
        cls = _load(entry)
        return Candidate(entry.name, cls, cls.probe(), origin)
    # A vendor's module may raise anything, SystemExit included; here all of it is a reason.
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        return Candidate(entry.name, None, Probe(0, reason), origin)


def _load(entry: EntryPoint) -> type[Platform]:
    module_name, _, attribute = entry.value.partition(":")
    cls = getattr(importlib.import_module(module_name), attribute)
    if not (isinstance(cls, type) and issubclass(cls, Platform)):
        raise TypeError(f"{entry.value} is not a Platform class.")
    fits = negotiate(cls.api)
    if not fits.accepted:
        raise RuntimeError(f"{cls.__name__} was {fits.reason}.")
    if fits.shim is not None:
        adapted: type[Platform] = fits.shim(cls)
        cls = adapted
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        raise TypeError(f"{cls.__name__} lacks {', '.join(missing)}.")
    if cls.name != entry.name and entry.name:
        raise ValueError(f"{cls.__name__} is called {cls.name!r}, its entry point {entry.name!r}.")
    return cls
