"""What a vendor's import must leave as it found it: Trimaran, torch, the process."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch

_TORCH = (torch, torch.nn.functional, torch.Tensor, torch.nn.Module, torch.nn.Linear)
_MISSING = object()


class Surroundings:
    """A picture of them, taken before a package is imported."""

    def __init__(self) -> None:
        self._ours = {owner: dict(vars(owner)) for owner in _ours()}
        self._torch = {owner: dict(vars(owner)) for owner in _TORCH}
        self._threads = set(threading.enumerate())
        self._settings = _settings()

    def changes(self, package: str) -> list[str]:
        """What the import and the probe of `package` have changed, a line each."""
        return [
            *self._changes_of_ours(package),
            *self._changes_of_torch(),
            *(
                f"changes torch's {name} from {self._settings[name]} to {now}"
                for name, now in _settings().items()
                if now != self._settings[name]
            ),
            *(
                f"starts the thread {thread.name!r}, which is no daemon"
                for thread in threading.enumerate()
                if thread not in self._threads and not thread.daemon
            ),
        ]

    def _changes_of_ours(self, package: str) -> Iterator[str]:
        """Members replaced or removed, and members of `package` put in: also in modules of ours
        that it was the first to import."""
        for owner in _ours():
            before = self._ours.get(owner, {})
            now = dict(vars(owner))
            for name in sorted(before.keys() | now.keys()):
                value = now.get(name, _MISSING)
                if name in before:
                    changed = value is not before[name]
                else:
                    changed = _home(value).partition(".")[0] == package
                if changed:
                    yield f"changes {_title(owner)}.{name}"

    def _changes_of_torch(self) -> Iterator[str]:
        """Callables replaced. What is added is a device module's way to register itself."""
        for owner, before in self._torch.items():
            for name, value in before.items():
                now = vars(owner).get(name, _MISSING)
                if callable(value) and now is not value and not _home(now).startswith("torch"):
                    yield f"changes {_title(owner)}.{name}"


def _ours() -> list[Any]:
    """Our modules so far, and the classes they define."""
    modules = [module for name, module in sys.modules.items() if _is_ours(name)]
    classes = (
        value
        for module in modules
        for value in list(vars(module).values())
        if isinstance(value, type) and _is_ours(value.__module__)
    )
    return [*modules, *dict.fromkeys(classes)]


def _is_ours(name: object) -> bool:
    return isinstance(name, str) and name.partition(".")[0] == "trimaran"


def _home(value: object) -> str:
    """The module that a function or class is from, whatever `functools.wraps` makes it say."""
    if isinstance(value, staticmethod | classmethod | MethodType):
        value = value.__func__
    if isinstance(value, FunctionType):
        return str(value.__globals__.get("__name__", ""))
    return "" if isinstance(value, ModuleType) else str(getattr(value, "__module__", ""))


def _title(owner: Any) -> str:
    return (
        owner.__name__ if isinstance(owner, ModuleType) else f"{owner.__module__}.{owner.__name__}"
    )


def _settings() -> dict[str, object]:
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "number of threads": torch.get_num_threads(),
        "state of CUDA": "initialised" if _cuda_is_up() else "untouched",
    }


def _cuda_is_up() -> bool:
    return bool(torch.cuda.is_initialized())  # type: ignore[no-untyped-call]
