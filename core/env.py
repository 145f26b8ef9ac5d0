"""Every environment variable of the package's own, and reading those that are not a platform's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import ConfigError

VARIABLES = {
    "TRIMARAN_API_KEY": "accepted API keys, separated by commas",
    "TRIMARAN_LOG_LEVEL": "debug, info, warning or error",
    "TRIMARAN_CPU_ISA": "the highest instruction set that kernels use (kernels_cpu/library.py)",
    "TRIMARAN_CPU_LIBRARY": "another build of the kernels to load (kernels_cpu/library.py)",
    "TRIMARAN_CPU_THREADS_BIND": "auto, off, or the CPUs of its threads (platforms/cpu_threads.py)",
}
"""Name → what it says. Those of kernels and platforms are read there: they do not import the core.
What begins with HF_ is the hub library's own business."""

LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class Environment:
    """What the environment says; the fields are named like their variables."""

    api_keys: tuple[str, ...] = ()
    log_level: str | None = None


def read_environment(environ: Mapping[str, str] | None = None) -> Environment:
    """Read `environ` (the process's own by default). Raises `ConfigError` naming the variable."""
    values = os.environ if environ is None else environ
    level = values.get("TRIMARAN_LOG_LEVEL", "").strip().lower() or None
    if level is not None and level not in LOG_LEVELS:
        choices = ", ".join(LOG_LEVELS)
        raise ConfigError(f"TRIMARAN_LOG_LEVEL is {level!r}; choose one of {choices}.")
    keys = (key.strip() for key in values.get("TRIMARAN_API_KEY", "").split(","))
    return Environment(
        api_keys=tuple(key for key in keys if key),
        log_level=level,
    )


def child_environment(changes: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with `changes`, for a process that it starts."""
    return {**os.environ, **changes}
