"""What both vendors' hulls say of the cards they find: a survey, and the probe made of it."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType

from .gpu_wheels import Index, Version, Wheel, best_index
from .interface import DeviceInfo, Probe, Telemetry

SCORE = 100
"""Above any processor: where a card and the right torch are there, they are meant."""


@dataclass(frozen=True, slots=True)
class Card:
    """One device as the vendor's management library describes it. `memory` in bytes (0: unknown);
    `uuid` may be empty. `key`: how the library finds it again. `code`: the architecture whose
    code it is made to run (empty: its own)."""

    uuid: str
    name: str
    memory: int
    architecture: str
    key: str = ""
    code: str = ""

    @property
    def runs_as(self) -> str:
        return self.code or self.architecture


@dataclass(frozen=True, slots=True)
class Survey:
    """The cards that this process may use, in the order of their device indices. `problem`: why
    none could be looked for. `hidden`: how many an environment variable hides, and `hidden_by`
    which. `driver`: the newest version of the vendor's software that the driver runs (None: any).
    `notes`: what was left out, and why."""

    cards: tuple[Card, ...] = ()
    problem: str = ""
    hidden: int = 0
    hidden_by: str = ""
    driver: Version | None = None
    notes: tuple[str, ...] = field(default=())

    def restricted(self, chosen: Sequence[int], setting: str) -> Survey:
        """Only the cards at `chosen`, as the variable and value in `setting` want it."""
        hidden = len(self.cards) - len(chosen)
        cards = tuple(self.cards[i] for i in chosen)
        if not hidden:
            return replace(self, cards=cards)
        return replace(self, cards=cards, hidden=self.hidden + hidden, hidden_by=setting)


@dataclass(frozen=True, slots=True)
class Vendor:
    """What differs between the hulls in the sentences they say. `order`: the setting without which
    the vendor's runtime numbers cards in an order of its own (empty: none is needed)."""

    title: str
    software: str
    indexes: tuple[Index, ...]
    order: str = ""


def load_library(module: str, package: str) -> ModuleType | str:
    """A vendor's management library, or why it cannot be used here."""
    try:
        # One of them prints where it raises; a probe prints nothing.
        with contextlib.redirect_stdout(io.StringIO()):
            return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            return f"{package} is not installed: pip install {package}"
        return f"{package} cannot be imported: {error}"
    except Exception as error:  # amdsmi looks its C library up when it is imported, and trips
        return f"{package} cannot be used ({type(error).__name__}: {error}): no driver, probably"


def probe_of(survey: Survey, wheel: Wheel, built_for: str, vendor: Vendor) -> Probe:
    """The probe of a survey. `built_for`: the version of the vendor's software that `wheel` was
    built for (empty: another vendor's, or none)."""
    if survey.problem:
        return Probe(0, survey.problem)
    if not survey.cards:
        hidden = f"; {survey.hidden_by} hides {survey.hidden}" if survey.hidden else ""
        return Probe(0, "; ".join((f"no {vendor.title} device{hidden}", *survey.notes)))
    usable = [i for i, card in enumerate(survey.cards) if wheel.runs(card.runs_as)]
    devices = tuple(_info(i, survey.cards[i]) for i in range(len(survey.cards)))
    problem = _wheel_problem(survey, wheel, built_for, vendor, bool(usable))
    if problem:
        return Probe(0, problem, devices)
    kept = tuple(devices[i] for i in usable)
    left_out = [
        f"torch {wheel.version} has no code for {card.name} ({card.runs_as})"
        for i, card in enumerate(survey.cards)
        if i not in usable
    ]
    found = f"{summary(kept)}, torch for {vendor.software} {built_for}"
    return Probe(SCORE, "; ".join((found, *left_out, *survey.notes)), kept)


def summary(devices: Sequence[DeviceInfo]) -> str:
    """`2 x NVIDIA H200 (sm_90), NVIDIA L4 (sm_89)`."""
    counts: dict[str, int] = {}
    for info in devices:
        text = f"{info.name} ({info.architecture})"
        counts[text] = counts.get(text, 0) + 1
    return ", ".join(f"{n} x {text}" if n > 1 else text for text, n in counts.items())


def state(now: Telemetry) -> str:
    """`698 W, 61 °C, 97% busy, held down by: power cap`; empty where nothing is told."""
    figures = {"W": now.power, "°C": now.temperature, "MHz": now.clock}
    parts = [f"{value:.0f} {unit}" for unit, value in figures.items() if value is not None]
    if now.utilization is not None:
        parts.append(f"{now.utilization:.0%} busy")
    if now.throttled:
        parts.append(f"held down by: {', '.join(now.throttled)}")
    return ", ".join(parts)


def _info(index: int, card: Card) -> DeviceInfo:
    return DeviceInfo(index, card.name, card.memory, card.architecture)


def _wheel_problem(
    survey: Survey, wheel: Wheel, built_for: str, vendor: Vendor, runs_on_some: bool
) -> str:
    """Why this torch does not serve these cards, and what to install; empty: it does."""
    if not built_for:
        other = f"for {'CUDA' if wheel.cuda else 'ROCm'}" if wheel.cuda or wheel.hip else "for CPUs"
        why = f"torch {wheel.version} is built {other}, not for {vendor.software}"
    elif survey.driver is not None and int(built_for.partition(".")[0]) > survey.driver[0]:
        newest = ".".join(map(str, survey.driver))
        why = (
            f"torch {wheel.version} is built for {vendor.software} {built_for}, but the driver "
            f"runs {vendor.software} up to {newest}"
        )
    elif not runs_on_some:
        names = ", ".join(dict.fromkeys(card.runs_as for card in survey.cards))
        why = f"torch {wheel.version} has no code for {names}"
    else:
        return ""
    architectures = list(dict.fromkeys(card.runs_as for card in survey.cards))
    index = best_index(vendor.indexes, architectures, survey.driver)
    cards = summary([_info(i, card) for i, card in enumerate(survey.cards)])
    remedy = (
        index.command
        if index is not None
        else f"no build of torch that {vendor.title}'s driver here runs has code for "
        f"{', '.join(architectures)}; a newer driver may help"
    )
    return f"{cards}: {why}. {'Install' if index else 'However,'}: {remedy}"
