"""What importing and probing a platform does to the process: seen from a fresh one
(`python -m trimaran.conformance.purity REFERENCE`), which prints its findings as JSON."""

from __future__ import annotations

import inspect
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

WATCHED = ("torch", "torch.nn.functional", "torch.nn.modules.module", "torch.cuda")
TIME_LIMIT = 120.0
"""Seconds for the import and a probe."""

Snapshot = Mapping[str, Any]
"""`module.attribute` or `module.Class.attribute` → the object itself, which is thereby kept alive
so that no other can come to have its identity; of a table, its items too."""

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
    modules = list(_modules())
    before = snapshot(modules)
    environment = child_environment({})
    threads, state = _threads(), _torch_state()
    cls = choose(reference)  # imports it, and asks it once
    changed = compare(before, snapshot(modules))
    changed += [
        f"the environment: {name}" for name in _differing(environment, child_environment({}))
    ]
    cls.probe()
    begun = sorted(set(_threads()) - set(threads))
    now = _torch_state()
    probed = [f"started a thread: {name}" for name in begun]
    probed += [f"changed {name} to {now[name]}" for name in _differing(state, now)]
    return {"import": changed, "probe": probed}


def _modules() -> Iterator[ModuleType]:
    """The engine's deck and what of torch others may be tempted to patch, imported."""
    for package in (core, platforms):
        for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            if info.name.endswith(("__main__",)):
                continue
            try:
                yield import_module(info.name)
            except ImportError:  # of an extra that is not installed, or not a platform's host
                continue
    yield from map(import_module, WATCHED)


def snapshot(modules: list[ModuleType]) -> Snapshot:
    seen: dict[str, Any] = {}
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, ModuleType) or name.startswith("__"):
                continue
            at = f"{module.__name__}.{name}"
            seen[at] = value
            if inspect.isclass(value) and _watched(value, module):
                seen.update((f"{at}.{key}", one) for key, one in list(vars(value).items()))
            elif type(value) in (dict, list):
                items = value.items() if isinstance(value, dict) else enumerate(value)
                seen.update((f"{at}[{key!r}]", one) for key, one in list(items))
    return seen


def _watched(cls: type, module: ModuleType) -> bool:
    return cls.__module__ == module.__name__ or cls is torch.Tensor


def compare(before: Snapshot, after: Snapshot) -> list[str]:
    """Names that mean something else now. New names are torch's own affair (it loads lazily), and
    a finding in our modules, their private tables apart."""
    ours = __name__.partition(".")[0] + "."
    return sorted(
        name
        for name in before.keys() | after.keys()
        if (name in before or (name.startswith(ours) and not _private_table(name)))
        and before.get(name) is not after.get(name)
        and not _bookkeeping(name)
    )


def _private_table(name: str) -> bool:
    """Is it an entry of a module's own table, such as a cache?"""
    return "[" in name and name.partition("[")[0].rpartition(".")[2].startswith("_")


def _bookkeeping(name: str) -> bool:
    """What Python itself writes into a class when it is subclassed or asked."""
    return name.rpartition(".")[2] in ("_abc_impl", "__abstractmethods__", "__weakref__")


def _threads() -> list[str]:
    """Of Python by name, and where the system tells them, native ones by number."""
    named = [one.name for one in threading.enumerate()]
    tasks = Path("/proc/self/task")
    return named + ([f"native {one.name}" for one in tasks.iterdir()] if tasks.exists() else [])


def _torch_state() -> dict[str, Any]:
    return {
        "torch's thread count": torch.get_num_threads(),
        "torch's default dtype": str(torch.get_default_dtype()),
        "torch's default device": str(torch.get_default_device()),
        "whether an accelerator is initialised": torch.cuda.is_initialized(),
        "torch's deterministic mode": torch.are_deterministic_algorithms_enabled(),
    }


def _differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return sorted(
        name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
    )
