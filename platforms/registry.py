"""Discovery: which platforms there are, whether they work here, and which one to use.

Built-in platforms and those of installed packages (entry points, group `trimaran.platforms`) take
the same road: a reference `module:Class`, imported, checked and probed inside one guard. Whatever
goes wrong on it becomes the reason that `trimaran platforms` prints, never an import error.

Before that an installed package is asked for its manifest, and tried once in a process of its own.
"""

from __future__ import annotations

import difflib
import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from .. import __version__
from .interface import Platform, PlatformUnavailable, Probe
from .loading import TRIAL_SECONDS, ask, load, one_line, reason_of
from .user_environment import user_cache as user_cache  # the core's, too

if TYPE_CHECKING:
    from packaging.specifiers import SpecifierSet

logger = logging.getLogger("trimaran.platforms")

GROUP = "trimaran.platforms"

_BUILT_IN = tuple(
    EntryPoint(name, f"{__package__}.{name}:{name.capitalize()}Platform", GROUP)
    for name in ("cpu", "cuda", "rocm", "strict")
)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One known platform. `cls` is None where it is broken; `probe.reason` says why it can or
    cannot be used, `origin` which distribution brought it, with its version."""

    name: str
    cls: type[Platform] | None
    probe: Probe
    origin: str = ""

    @property
    def usable(self) -> bool:
        return self.cls is not None and self.probe.score > 0


def available(trial_seconds: float = TRIAL_SECONDS) -> list[Candidate]:
    """Every known platform, the best first. Initialises no device and never raises.

    Classes are loaded once in a process; probes are asked anew. An installed package that was not
    tried before has `trial_seconds`.
    """
    found = [_examine(entry, trial_seconds) for entry in _BUILT_IN]
    taken = {entry.name: "a built-in platform" for entry in _BUILT_IN}
    for entry in _installed():
        if entry.name in taken:
            found.append(_doubled(entry, taken[entry.name]))
            continue
        taken[entry.name] = _release(entry)
        found.append(_examine(entry, trial_seconds))
    return sorted(found, key=lambda candidate: -candidate.probe.score)


def choose(name: str = "auto") -> type[Platform]:
    """The class of the platform `name`, or for `auto` of the usable one with the highest score.
    `module:Class` names a class that need not be installed: a vendor's work in progress.

    With `auto` each broken package is a warning, once in a process. Raises `PlatformUnavailable`,
    listing each platform and its reason.
    """
    if ":" in name:
        return _usable(_examine(EntryPoint("", name, GROUP)), name)
    for entry in (*_BUILT_IN, *_installed()):
        if entry.name == name:  # whoever asks for it does not wait for the others
            return _usable(_examine(entry), name)
    candidates = available()
    for candidate in candidates:
        if candidate.cls is None:
            _warn_once(f"platform {candidate.name} ({candidate.origin}): {candidate.probe.reason}")
    for candidate in candidates:
        if candidate.cls is not None and candidate.usable and name == "auto":
            return candidate.cls
    raise _unavailable(name, candidates)


def forget() -> None:
    """Load every platform anew, and try installed packages anew."""
    from .trial_memory import TrialMemory

    TrialMemory().forget()
    _loaded.clear()


def _usable(candidate: Candidate, name: str) -> type[Platform]:
    if candidate.cls is None or not candidate.usable:
        if ":" not in name:
            raise _unavailable(name, available())
        raise PlatformUnavailable(f"Platform {name} is not usable: {candidate.probe.reason}")
    return candidate.cls


def _unavailable(name: str, candidates: list[Candidate]) -> PlatformUnavailable:
    said = "No platform is usable here."
    if name != "auto":
        near = difflib.get_close_matches(name.lower(), [c.name for c in candidates], n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        said = f"There is no platform {name!r}{meant}."
        for candidate in candidates:
            if candidate.name == name:
                said = f"Platform {name!r} is not usable here: {candidate.probe.reason}"
    others = [f"  {c.name}: {c.probe.reason or 'usable'}" for c in candidates if c.name != name]
    return PlatformUnavailable("\n".join([said, "Known platforms:", *others]))


@functools.cache
def _warn_once(line: str) -> None:
    logger.warning("%s", line)


# ---------------------------------------------------------------------------------------------
# One entry point
# ---------------------------------------------------------------------------------------------


def _installed() -> Iterator[EntryPoint]:
    """Entry points of installed packages, in the order of their distributions' names."""
    try:
        found = list(entry_points(group=GROUP))
    except Exception as error:  # one package's broken metadata, of any group
        _warn_once(f"entry points of installed packages cannot be read: {reason_of(error)}")
        return
    yield from sorted(found, key=lambda entry: (_release(entry).casefold(), entry.name))


def _doubled(entry: EntryPoint, holder: str) -> Candidate:
    """A second platform of one name: never imported. Its listed name says whose it is."""
    release = _release(entry)
    reason = f"{entry.name} is also the name of {holder}, which is kept: uninstall one of them"
    return Candidate(f"{entry.name} ({release})", None, Probe(0, one_line(reason)), release)


def _examine(entry: EntryPoint, trial_seconds: float = TRIAL_SECONDS) -> Candidate:
    origin = _release(entry)
    # A vendor's module may raise anything, SystemExit included; here all of it is a reason.
    try:
        loaded = _load_once(entry, trial_seconds)
        if isinstance(loaded, str):
            return Candidate(entry.name, None, Probe(0, loaded), origin)
        return Candidate(entry.name, loaded, ask(loaded), origin)
    except (Exception, SystemExit) as error:
        return Candidate(entry.name, None, Probe(0, reason_of(error)), origin)


_loaded: dict[EntryPoint, type[Platform] | str] = {}


def _load_once(entry: EntryPoint, trial_seconds: float) -> type[Platform] | str:
    """The class, or why there is none."""
    if entry not in _loaded:
        try:
            asked = None if entry.dist is None else _admit(entry, trial_seconds)
            _loaded[entry] = load(entry.value, entry.name, asked)
        except (Exception, SystemExit) as error:
            _loaded[entry] = reason_of(error)
    return _loaded[entry]


def _admit(entry: EntryPoint, trial_seconds: float) -> SpecifierSet:
    """May this package's code run in this process? The contract versions that it asks for.

    Raises `ManifestError`, or `HarmfulPackage` with what the trial found, now or earlier.
    """
    from .manifest import check_manifest, read_manifest
    from .trial import HarmfulPackage, try_out
    from .trial_memory import TrialMemory, fingerprint

    manifest = read_manifest(entry.value)
    release = _release(entry)
    check_manifest(manifest, release.partition(" ")[0])
    memory, mark = TrialMemory(), fingerprint(entry.value, release, manifest)
    verdict = memory.recall(entry.value, mark)
    if verdict is None:
        verdict = try_out(entry.value, entry.name, trial_seconds)
        memory.remember(entry.value, mark, verdict)
    elif verdict:
        verdict += " (found earlier; trimaran platforms --rescan tries again)"
    if verdict:
        raise HarmfulPackage(verdict)
    return manifest.api


def _release(entry: EntryPoint) -> str:
    """Name and version of the distribution that brings the platform."""
    if entry.dist is None:
        return f"trimaran {__version__}" if entry in _BUILT_IN else ""
    try:
        return one_line(f"{entry.dist.name} {entry.dist.version}")
    except Exception as error:  # metadata that is missing or damaged
        return one_line(f"a package without a name ({error})")
