"""The levels of the kit, each a module with `checks(subject)`. A module is imported when its level
runs: the higher ones need the packages of the `server` extra, the lower ones do without."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from .base import Check, Level, Subject


def _in(module: str) -> Callable[[Subject], list[Check]]:
    def checks(subject: Subject) -> list[Check]:
        found: list[Check] = import_module(f".{module}", __package__).checks(subject)
        return found

    return checks


LEVELS: tuple[Level, ...] = (
    Level("L0", "the contract", _in("l0_contract")),
    Level("L1", "ops and attention against their references", _in("l1_ops")),
    Level("L2", "random KV programs against a model", _in("l2_kv")),
    Level("L3", "engines, token by token", _in("l3_engine")),
    Level("L4", "several ranks", _in("l4_ranks")),
    Level("L5", "serving", _in("l5_serving")),
)


def level(name: str) -> Level:
    """Raises `KeyError`, naming the levels there are."""
    for one in LEVELS:
        if one.name == name:
            return one
    raise KeyError(f"There is no level {name!r}, only {', '.join(one.name for one in LEVELS)}.")
