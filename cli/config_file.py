"""`--config FILE`: flags from a JSON or YAML file; what is given on the command line wins."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from ..core.args import flag_fields
from ..core.errors import ConfigError
from .flags import convert


def merge(namespace: argparse.Namespace, path: str, *classes: type) -> None:
    """Adds the file's values for the flags that the command line left out."""
    known = {field.name: one for one in classes for field in flag_fields(one)}
    for key, value in read(path).items():
        name = key.replace("-", "_")
        if name not in known:
            raise ConfigError(f"--config {path}: there is no flag `{key}`.")
        try:
            converted = convert(known[name], name, value)
        except ValueError as error:
            raise ConfigError(f"--config {path}: {error}.") from None
        if not hasattr(namespace, name):
            setattr(namespace, name, converted)


def read(path: str) -> dict[str, Any]:
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: {error}.") from None
    value = _parse(text, path)
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigError(f"--config {path}: the file must hold a mapping of flags to values.")
    return value


def _parse(text: str, path: str) -> Any:
    if path.endswith(".json"):
        try:
            return json.loads(text)
        except ValueError as error:
            raise ConfigError(f"--config {path}: not valid JSON: {error}.") from None
    try:
        import yaml
    except ImportError:
        raise ConfigError(
            f"--config {path}: reading YAML needs the package pyyaml "
            "(pip install pyyaml); a .json file needs nothing."
        ) from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path}: not valid YAML: {error}.") from None
