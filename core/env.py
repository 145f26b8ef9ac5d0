"""Every environment variable that the package reads, typed, in one place."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import ConfigError

LOG_LEVELS = ("debug", "info", "warning", "error")


@dataclass(frozen=True, slots=True)
class Environment:
    """What the environment says.

    `api_keys` (TRIMARAN_API_KEY): accepted API keys, separated by commas. `log_level`
    (TRIMARAN_LOG_LEVEL). What begins with HF_ is the hub library's own business.
    """

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
