"""What importing and probing a platform does to the process: seen from a fresh one
(`python -m trimaran.conformance.purity REFERENCE`), which prints its findings as JSON."""

from __future__ import annotations

import json
import pkgutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .. import core, platforms
from ..core.env import child_environment
from ..platforms.registry import choose
from ..platforms.surroundings import Surroundings

TIME_LIMIT = 120.0
"""Seconds for the import and a probe."""

Findings = Mapping[str, list[str]]
"""`import` and `probe` → what each did that it may not."""


@lru_cache
def purity(reference: str) -> Findings:
    """What a fresh process finds out about `reference`. Raises `RuntimeError` if it dies."""
    program = (
        f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import main; main({reference!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=TIME_LIMIT
    )
    if done.returncode:
        raise RuntimeError(f"importing and probing it ends the process: {done.stderr[-800:]}")
    found: Findings = json.loads(done.stdout.splitlines()[-1])
    return found


def main(reference: str) -> None:
    print("\n" + json.dumps(examine(reference)))


def examine(reference: str) -> Findings:
    """Discovery asks the same of `Surroundings`; here the deck is complete before, and what only a
    fresh process can tell is asked as well: its threads, its environment, its devices."""
    modules = list(_modules())
    environment, tables = child_environment({}), _tables(modules)
    threads, devices = _threads(), _devices_in_use()
    surroundings = Surroundings()
    cls = choose(reference)  # imports it, and asks it once
    changed = surroundings.changes(cls.__module__.partition(".")[0])
    changed += [f"changes {name}" for name in _differing(tables, _tables(modules))]
    now = child_environment({})
    changed += [f"changes the environment: {name}" for name in _differing(environment, now)]
    cls.probe()
    begun = [f"started a thread: {name}" for name in sorted(set(_threads()) - set(threads))]
    used = [f"initialised {name}" for name in sorted(_devices_in_use() - devices)]
    return {"import": sorted(changed), "probe": begun + used}


def _modules() -> Iterator[ModuleType]:
    """The engine's deck, imported."""
    for package in (core, platforms):
        for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if info.name.endswith(("__main__",)):
                continue
            try:
                yield import_module(info.name)
            except ImportError:  # of an extra that is not installed, or not a platform's host
                continue


def _tables(modules: list[ModuleType]) -> Mapping[str, Any]:
    """What stands in the modules' public dicts and lists, such as that of the ops."""
    found: dict[str, Any] = {}
    for module in modules:
        for name, value in list(vars(module).items()):
            if not name.startswith("_") and type(value) in (dict, list):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                found |= {f"{module.__name__}.{name}[{key!r}]": one for key, one in list(items)}
    return found


def _threads() -> list[str]:
    """Of Python by name, and where the system tells them, native ones by number."""
    named = [one.name for one in threading.enumerate()]
    tasks = Path("/proc/self/task")
    return named + ([f"native {one.name}" for one in tasks.iterdir()] if tasks.exists() else [])


def _devices_in_use() -> set[str]:
    """Kinds of devices that torch has initialised: its own, and a vendor's who registered one."""
    accelerator = torch.accelerator.current_accelerator(check_available=False)
    names = {"cuda", "xpu", "mtia", torch._C._get_privateuse1_backend_name()}
    names |= {accelerator.type} if accelerator is not None else set()
    modules = {name: getattr(torch, name, None) for name in names}
    asked = {name: getattr(module, "is_initialized", None) for name, module in modules.items()}
    return {name for name, initialised in asked.items() if initialised and initialised()}


def _differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    names = before.keys() | after.keys()
    return sorted(
        name
        for name in names
        if (name in before) != (name in after)
        or (before.get(name) is not after.get(name) and before.get(name) != after.get(name))
    )
