"""Command-line flags out of the fields of the argument dataclasses."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..core.args import flag_fields
from ..core.errors import ConfigError

A = TypeVar("A")

SCALARS: dict[type, Callable[[str], Any]] = {str: str, int: int, float: float}


def add_flags(
    parser: argparse.ArgumentParser, args_class: type, *, skip: Sequence[str] = ()
) -> None:
    """One flag a field. A flag that is not given leaves no trace in the namespace."""
    hints = typing.get_type_hints(args_class)
    group = parser.add_argument_group(args_class.__name__.removesuffix("Args").lower())
    for field in flag_fields(args_class):
        if field.name in skip:
            continue
        silent = (None, False, "", dataclasses.MISSING)
        shown = "" if field.default in silent else f" (default: {field.default})"
        group.add_argument(
            f"--{field.name.replace('_', '-')}",
            dest=field.name,
            default=argparse.SUPPRESS,
            help=(field.metadata["help"] + shown).replace("%", "%%"),
            **_options(_bare(hints[field.name]), field.metadata["choices"]),
        )


def build(args_class: type[A], namespace: argparse.Namespace) -> A:
    """The dataclass with what was given in `namespace`."""
    names = {field.name for field in flag_fields(args_class)}
    return args_class(**{key: value for key, value in vars(namespace).items() if key in names})


def convert(args_class: type, name: str, value: Any) -> Any:
    """A value of a configuration file as the field's type; raises `ValueError`."""
    hint = _bare(typing.get_type_hints(args_class)[name])
    wanted = typing.get_origin(hint) or hint
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if wanted is list:
        return [str(one) for one in (value if isinstance(value, list) else [value])]
    if number and wanted in (str, float):
        return wanted(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise ValueError(f"{name} is {value!r}; it must be of type {wanted.__name__}")
    return value


def number(
    kind: Callable[[str], float], low: float, high: float = math.inf
) -> Callable[[str], float]:
    """The type of a flag that takes a number in [low, high]."""

    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            bounds = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}")
        return value

    parse.__name__ = kind.__name__  # in argparse's own message of what is no number
    return parse


def check_writable(name: str) -> None:
    """Raise `ConfigError` now if the file cannot be written after minutes of work."""
    path = Path(name)
    try:
        new = not path.exists()
        path.open("ab").close()
        if new:
            path.unlink()
    except OSError as error:
        raise ConfigError(f"{name} cannot be written: {error.strerror}.", param="report") from None


def json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError("must be a JSON object")
    return value


def _options(hint: Any, choices: tuple[str, ...] | None) -> dict[str, Any]:
    if hint is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(hint) is list:
        return {"action": "append", "metavar": "VALUE"}
    if typing.get_origin(hint) is dict:
        return {"type": json_object, "metavar": "JSON"}
    shown = {"choices": choices} if choices else {"metavar": hint.__name__.upper()}
    return {"type": SCALARS[hint], **shown}


def _bare(hint: Any) -> Any:
    """`str` for `str | None`."""
    if not isinstance(hint, types.UnionType):
        return hint
    return next(one for one in typing.get_args(hint) if one is not type(None))
