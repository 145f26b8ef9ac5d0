"""`trimaran doctor`: a report on the environment, to read or to attach to an issue."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import sys
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .. import __version__

BASE_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "numpy",
    "jinja2",
    "rich",
    "psutil",
)
SERVER_PACKAGES = (
    "fastapi",
    "uvicorn",
    "uvloop",
    "httptools",
    "pydantic",
    "msgspec",
    "pyzmq",
    "prometheus-client",
)
# Those that decide which kernels can run; the rest of the line is long and says little.
FLAG_BEGINNINGS = ("avx", "amx", "fma", "f16c", "sse4")
MIN_OPEN_FILES = 4_096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="Print JSON.")


def run(namespace: argparse.Namespace) -> int:
    report = build_report()
    if namespace.json:
        json.dump(report, sys.stdout, indent=2)
        print()
        return 0
    for section, values in report.items():
        print(section)
        rows = values.items() if isinstance(values, dict) else ((line, "") for line in values)
        for name, value in rows:
            shown = " ".join(value) if isinstance(value, list) else value
            print(f"  {name}{f': {shown}' if shown != '' else ''}")
    return 0


def build_report() -> dict[str, Any]:
    """Versions, processor, memory, limits, platforms; and what looks wrong."""
    report: dict[str, Any] = {
        "versions": _versions(),
        "system": {
            "os": platform.platform(),
            "python": f"{platform.python_version()} ({sys.implementation.name})",
            "libc": " ".join(platform.libc_ver()),
        },
        "processor": _processor(),
        "memory": _memory(),
        "limits": _limits(),
        "platforms": _platforms(),
    }
    report["remarks"] = list(_remarks(report)) or ["nothing looks wrong"]
    return report


def _versions() -> dict[str, str]:
    found = {"trimaran": __version__}
    for name in BASE_PACKAGES + SERVER_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def _processor() -> dict[str, Any]:
    import psutil

    name, flags = "unknown", set[str]()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
                break
    except OSError:
        name = platform.processor() or "unknown"
    return {
        "name": name,
        "physical cores": psutil.cpu_count(logical=False),
        "logical cores": os.cpu_count(),
        "usable here": len(os.sched_getaffinity(0)),
        "flags": sorted(flag for flag in flags if flag.startswith(FLAG_BEGINNINGS)),
    }


def _memory() -> dict[str, str]:
    import psutil

    memory = psutil.virtual_memory()
    found = {"total": _gib(memory.total), "available": _gib(memory.available)}
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        found["limit of the container"] = _gib(int(text))
    shared = Path("/dev/shm")
    if shared.is_dir():
        found["shared memory"] = _gib(shutil.disk_usage(shared).total)
    return found


def _limits() -> dict[str, int]:
    return {"open files": resource.getrlimit(resource.RLIMIT_NOFILE)[0]}


def _platforms() -> dict[str, str]:
    try:
        from ..platforms.registry import available
    except ImportError as error:
        return {"none": f"not importable: {error}"}
    found = {}
    for candidate in available():
        facts = []
        if candidate.usable and candidate.cls is not None:
            try:
                facts = [f"{key} {value}" for key, value in candidate.cls().describe().items()]
            except Exception as error:  # a vendor's; the report goes on
                facts = [f"it cannot describe itself ({type(error).__name__}: {error})"]
        reason = candidate.probe.reason
        state = "usable" if candidate.usable else "not usable"
        found[candidate.name] = "; ".join(one for one in (state, reason, *facts) if one)
    return found


def _objections(names: Sequence[str]) -> Iterator[str]:
    """What these platforms, usable ones, say of an engine with the default model."""
    from ..core.args import EngineArgs
    from ..core.resolve import objections

    for name in names:
        try:
            for finding in objections(EngineArgs(platform=name)):
                yield f"{name}: {finding.reason}"
        except Exception as error:  # a vendor's
            yield f"{name} serves no engine ({type(error).__name__}: {error})"


def _remarks(report: dict[str, Any]) -> Any:
    for packages, need in ((BASE_PACKAGES, "everything"), (SERVER_PACKAGES, "`trimaran serve`")):
        missing = [name for name in packages if report["versions"][name] == "not installed"]
        if missing:
            yield f"not installed (needed by {need}): {', '.join(missing)}"
    if report["limits"]["open files"] < MIN_OPEN_FILES:
        yield f"the limit of open files is low: raise it (ulimit -n {MIN_OPEN_FILES})"
    usable = [name for name, text in report["platforms"].items() if text.startswith("usable")]
    if usable:
        yield from _objections(usable)
    else:
        yield "no platform is usable"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
