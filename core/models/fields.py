"""Reading config.json: every key with a declared type, and a missing one fails by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from ..errors import ConfigError

T = TypeVar("T")

REQUIRED: Any = object()
"""The default of a key that has none."""


class Fields:
    """Typed access to a JSON object; null counts as absent. Raises ConfigError naming the key."""

    def __init__(self, values: Mapping[str, Any], where: str = "config.json") -> None:
        self.values = values
        self.where = where

    def size(self, key: str, default: int = REQUIRED) -> int:
        """A count or width: an integer of at least 1."""
        value = self._read(key, int, default)
        if value < 1:
            raise self._error(key, "must be at least 1")
        return value

    def count(self, key: str, default: int = REQUIRED) -> int:
        """An integer of at least 0."""
        value = self._read(key, int, default)
        if value < 0:
            raise self._error(key, "must be at least 0")
        return value

    def number(self, key: str, default: float = REQUIRED) -> float:
        """A finite number above 0."""
        value = float(self._read(key, (int, float), default))
        if not (math.isfinite(value) and value > 0):
            raise self._error(key, "must be a finite number above 0")
        return value

    def flag(self, key: str, default: bool = REQUIRED) -> bool:
        return self._read(key, bool, default)

    def text(self, key: str, default: str = REQUIRED) -> str:
        return self._read(key, str, default)

    def one_of(self, key: str, choices: Mapping[str, T], default: str = REQUIRED) -> T:
        """The value that `choices` gives for the text at `key`."""
        name = self.text(key, default)
        if name not in choices:
            raise self._error(key, f"is not supported (supported: {', '.join(sorted(choices))})")
        return choices[name]

    def optional_size(self, key: str, default: int | None = None) -> int | None:
        """A size, or None where the key is null; `default` where it is not there at all."""
        if key not in self.values:
            return default
        return None if self.values[key] is None else self.size(key)

    def optional_number(self, key: str) -> float | None:
        return None if self.values.get(key) is None else self.number(key)

    def texts(self, key: str) -> list[str] | None:
        """A list of strings, or None."""
        value = self._read(key, list, None)
        if value is not None and not all(isinstance(item, str) for item in value):
            raise self._error(key, "must be a list of strings")
        return value

    def counts(self, key: str) -> list[int]:
        """A list of integers of at least 0; empty where the key is absent."""
        value = self._read(key, list, [])
        if not all(type(item) is int and item >= 0 for item in value):
            raise self._error(key, "must be a list of integers of at least 0")
        return value

    def object(self, key: str) -> Fields:
        """A nested object; empty where the key is absent."""
        return Fields(self._read(key, dict, {}), f"{self.where}: {key}")

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def _read(self, key: str, kind: Any, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is REQUIRED:
                raise ConfigError(f"{self.where} lacks the required key {key!r}.", param=key)
            return default
        # bool is an int to Python, never to a configuration.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self._error(key, f"must be of type {_kind_name(kind)}")
        return value

    def _error(self, key: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.where}: {key}={self.values.get(key)!r} {problem}.", param=key)


def _kind_name(kind: Any) -> str:
    return "number" if isinstance(kind, tuple) else kind.__name__
