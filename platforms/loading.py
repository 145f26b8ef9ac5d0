"""A platform's class, imported and asked, with every answer checked."""

from __future__ import annotations

import contextlib
import importlib
from typing import TYPE_CHECKING

from . import api
from .api import ApiRange, negotiate, unchecked, version_text
from .interface import DeviceInfo, Platform, Probe

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

TRIAL_SECONDS = 20.0
"""What the import and the probe of an installed package may take, the first time."""

MAX_SCORE = 10_000
_MAX_REASON = 300


def load(reference: str, name: str = "", asked: SpecifierSet | None = None) -> type[Platform]:
    """The class `reference` (`module:Class`), adapted where it is of the major before.

    `name`: what its entry point calls it. `asked`: the contract versions its manifest asks for.
    Raises whatever the import raises, and TypeError, ValueError or RuntimeError that say in which
    way it is not a platform of this engine.
    """
    module_name, _, attribute = reference.partition(":")
    foreign = asked is not None and version_text(api.PLATFORM_API) not in asked
    with unchecked() if foreign else contextlib.nullcontext():
        cls = getattr(importlib.import_module(module_name), attribute)
    if not (isinstance(cls, type) and issubclass(cls, Platform)):
        raise TypeError(f"{reference} is not a Platform class.")
    declared = getattr(cls, "api", None)
    if not isinstance(declared, ApiRange):
        raise TypeError(f"{cls.__name__}.api is {declared!r}; it must be an ApiRange.")
    ends = (declared.low, declared.high)
    if asked is not None and not all(version_text(end) in asked for end in ends):
        raise ValueError(f"{cls.__name__} says platform API {declared}, its manifest {asked}.")
    fits = negotiate(declared)
    if not fits.accepted:
        raise RuntimeError(f"{cls.__name__} was {fits.reason}.")
    if fits.shim is not None:
        adapted: type[Platform] = fits.shim(cls)
        cls = adapted
    missing = sorted(getattr(cls, "__abstractmethods__", ()))
    if missing:
        raise TypeError(f"{cls.__name__} lacks {', '.join(missing)}.")
    if name and getattr(cls, "name", None) != name:
        raise ValueError(
            f"{cls.__name__} is called {getattr(cls, 'name', '')!r}, its entry point {name!r}."
        )
    return cls


def ask(cls: type[Platform]) -> Probe:
    """The class's probe, and one instance of it if it says it is usable: neither may initialise
    anything. Raises TypeError or ValueError where the answer cannot be true."""
    probe = cls.probe()
    if not isinstance(probe, Probe) or not isinstance(probe.reason, str):
        raise TypeError(f"{cls.__name__}.probe() answers {probe!r}; it must be a Probe.")
    if type(probe.score) is not int or not 0 <= probe.score <= MAX_SCORE:
        raise ValueError(f"{cls.__name__} scores {probe.score!r}; scores are 0 to {MAX_SCORE}.")
    if not all(isinstance(device, DeviceInfo) for device in probe.devices):
        raise TypeError(f"{cls.__name__}.probe() names devices that are no DeviceInfo.")
    indices = [device.index for device in probe.devices]
    if len(set(indices)) < len(indices):
        raise ValueError(f"{cls.__name__}.probe() names a device twice: indices {indices}.")
    if probe.score > 0:
        cls()
    return probe


def reason_of(error: BaseException) -> str:
    """One line for a table or a log: `ImportError: libacme.so: cannot open …`."""
    if type(error).__module__.startswith("trimaran."):
        return one_line(str(error))
    return one_line(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)


def one_line(text: str) -> str:
    """`text` without line ends and control characters, and not too long."""
    shown = "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
    return shown if len(shown) <= _MAX_REASON else shown[: _MAX_REASON - 1] + "…"
