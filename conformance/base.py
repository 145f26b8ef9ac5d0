"""What every level of the kit is made of: a subject, checks, and the ways in which one ends."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial

from ..platforms.api import check_contract
from ..platforms.interface import Platform
from ..platforms.registry import choose

Measurements = Mapping[str, float]
"""What a check measured beside being right: unit → figure (`{"us": 12.0, "GB/s": 3.1}`)."""


class Failed(Exception):
    """A check found a fault. `case`: the smallest input that shows it, as text that a person can
    rerun or read; `seed`: the one it was made from."""

    def __init__(self, message: str, *, case: str = "", seed: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.case = case
        self.seed = seed


def expect(held: object, otherwise: str, *, case: str = "", seed: int | None = None) -> None:
    """Raise `Failed(otherwise)` unless `held` is true."""
    if not held:
        raise Failed(otherwise, case=case, seed=seed)


def expect_raises(kind: type[Exception], call: Callable[[], object], otherwise: str) -> None:
    """Raise `Failed(otherwise)` unless `call` raises `kind`."""
    try:
        call()
    except kind:
        return
    raise Failed(otherwise)


def refuse_foreign_members(cls: type, contract: type) -> None:
    """The check made when a class is defined, again: members can be set afterwards."""
    for one in cls.__mro__:
        if one is not contract and issubclass(one, contract):
            try:
                check_contract(one, contract)
            except TypeError as error:
                raise Failed(str(error)) from None


class Skipped(Exception):
    """A check does not apply here, and why. Required checks may not be skipped."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Subject:
    """What is examined: a platform by name or as `module:Class`, one device of it, and how."""

    reference: str
    device: int = 0
    seed: int = 0
    quick: bool = False

    @cached_property
    def cls(self) -> type[Platform]:
        """Raises `PlatformUnavailable` where it cannot be loaded or says that it is not here."""
        return choose(self.reference)

    def platform(self) -> Platform:
        """A new instance."""
        return self.cls()

    def seed_of(self, *parts: object) -> int:
        """A seed of its own for each thing: equal in every run that has the same `--seed`."""
        return zlib.crc32("/".join(map(str, (self.seed, *parts))).encode())


@dataclass(frozen=True)
class Check:
    """One thing to find out. `run` returns its measurements or None, and raises `Failed`,
    `Skipped`, or anything else, which is a failure too. `name` is unique in its level, its parts
    joined by `/`. One that takes longer than `seconds` (None: the kit's limit) hangs."""

    name: str
    run: Callable[[], Measurements | None]
    required: bool = True
    about: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class Level:
    """`checks` lists what there is to find out about a subject; it may ask the platform, and
    whatever it raises fails the level."""

    name: str
    title: str
    checks: Callable[[Subject], list[Check]]


Examination = Callable[[Subject], Measurements | None]


def listed(subject: Subject, table: Mapping[str, Examination]) -> list[Check]:
    """A required check for each entry of `table`: name → what is done with the subject."""
    return [
        Check(name, partial(run, subject), about=(run.__doc__ or "").partition("\n")[0])
        for name, run in table.items()
    ]
