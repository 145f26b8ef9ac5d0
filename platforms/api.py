"""Versions of the platform contract, and the checks made when a class of it is defined."""

from __future__ import annotations

import contextlib
import inspect
from abc import ABC
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar

PLATFORM_API = (0, 5)
"""(major, minor) of the contract that this engine has. Any change of a signature demands a bump.

Before 1.0 every minor may break. From 1.0 on minors only add, and the major before the current one
is still served, through a shim.
"""


@dataclass(frozen=True, slots=True)
class ApiRange:
    """The contract versions a platform was written for, both ends included."""

    low: tuple[int, int]
    high: tuple[int, int]

    def __contains__(self, version: object) -> bool:
        return isinstance(version, tuple) and self.low <= version <= self.high

    def __str__(self) -> str:
        low, high = version_text(self.low), version_text(self.high)
        return low if low == high else f"{low} to {high}"


def version_text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


Shim = Callable[[type[Any]], type[Any]]
"""Turns a platform class of the major before into one of this major."""

SHIMS: Mapping[int, Shim] = {}
"""Older major → its shim. Empty while the contract is 0.x."""


@dataclass(frozen=True, slots=True)
class Negotiation:
    """Whether a platform of some API range fits, why not, and through which shim if any."""

    accepted: bool
    reason: str = ""
    shim: Shim | None = None


def negotiate(
    declared: ApiRange,
    here: tuple[int, int] | None = None,
    shims: Mapping[int, Shim] | None = None,
) -> Negotiation:
    """Does a platform written for `declared` fit an engine of version `here` (None: this one)?"""
    here = PLATFORM_API if here is None else here
    shims = SHIMS if shims is None else shims
    if here in declared:
        return Negotiation(True)
    written = f"written for platform API {declared}; this engine has {version_text(here)}"
    if declared.low > declared.high:
        return Negotiation(False, f"its platform API range is empty: {declared}")
    if declared.low > here:
        return Negotiation(False, f"{written}: upgrade trimaran, or install an older release of it")
    major = declared.high[0]
    if major == here[0] and major > 0:
        return Negotiation(True)  # minors only add
    if major == here[0] - 1 and major in shims:
        return Negotiation(True, shim=shims[major])
    return Negotiation(False, f"{written}: install a newer release of it")


class Contract(ABC):
    """Base of the contract's classes. A subclass that overrides a member with another signature,
    or answers unknown attributes through `__getattr__`, is refused when it is defined.

    The direct subclasses are the contract; theirs are implementations. Those that were written for
    another version than this engine's are not checked (`negotiate` decides): a class says so by
    `api`, a package by its manifest.
    """

    api: ClassVar[ApiRange]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        contract = next((base for base in cls.__mro__[1:] if Contract in base.__bases__), None)
        if contract is None or _UNCHECKED.get() or PLATFORM_API not in getattr(cls, "api", _ANY):
            return
        for base in cls.__mro__[: cls.__mro__.index(contract)]:
            if base is cls or not issubclass(base, Contract):  # itself and what is mixed in
                check_contract(base, contract)


_UNCHECKED: ContextVar[bool] = ContextVar("unchecked", default=False)


@contextlib.contextmanager
def unchecked() -> Iterator[None]:
    """Classes defined inside belong to a package that was written for another version."""
    token = _UNCHECKED.set(True)
    try:
        yield
    finally:
        _UNCHECKED.reset(token)


_SEVERAL: Mapping[Any, str] = {
    inspect.Parameter.VAR_POSITIONAL: "*",
    inspect.Parameter.VAR_KEYWORD: "**",
}
_KINDS = (classmethod, staticmethod, property)
_ANY = ApiRange((0, 0), (1 << 30, 0))


def check_contract(cls: type, contract: type) -> None:
    """Raise `TypeError` if `cls` itself overrides a member of `contract` with another signature
    or another kind of method, or answers unknown attributes through `__getattr__`."""
    if "__getattr__" in vars(cls):
        raise TypeError(f"{cls.__name__} defines __getattr__: the contract forbids it.")
    for name, theirs in vars(cls).items():
        ours = inspect.getattr_static(contract, name, None)
        if name.startswith("__") or not _is_method(ours):  # `__call__` is each op's own
            continue
        same_kind = all(isinstance(theirs, k) == isinstance(ours, k) for k in _KINDS)
        expected = _parameters(ours)
        if not same_kind or expected != _parameters(theirs):
            raise TypeError(
                f"{cls.__name__}.{name}({', '.join(_parameters(theirs))}) does not match the "
                f"platform contract's {name}({', '.join(expected)}) "
                f"(PLATFORM_API {version_text(PLATFORM_API)})."
            )


def _is_method(member: object) -> bool:
    return inspect.isfunction(member) or isinstance(member, classmethod)


def _parameters(member: Any) -> list[str]:
    """Parameters as a caller sees them: `self`, `device=`, `*args`, `*, tag`."""
    function = inspect.unwrap(getattr(member, "__func__", member))
    if not callable(function):
        return [f"not a method: {member!r}"]
    shown = []
    for parameter in inspect.signature(function).parameters.values():
        mark = _SEVERAL.get(parameter.kind, "")
        default = "=" if parameter.default is not parameter.empty else ""
        keyword = "*, " if parameter.kind is parameter.KEYWORD_ONLY else ""
        shown.append(f"{keyword}{mark}{parameter.name}{default}")
    return shown
