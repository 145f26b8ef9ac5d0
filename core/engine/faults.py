"""Errors that cross a process border: by the name of their class in `core.errors`."""

from __future__ import annotations

from .. import errors
from ..errors import QueueFullError, TrimaranError


def kind_of(error: BaseException) -> str:
    """The nearest class of the hierarchy; any other error's own name."""
    for cls in type(error).__mro__:
        if getattr(errors, cls.__name__, None) is cls:
            return cls.__name__
    return type(error).__name__


def one_line(error: BaseException) -> str:
    """What the user reads of an error: an error of ours speaks for itself."""
    text = str(error)
    if isinstance(error, TrimaranError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def revive(
    kind: str, message: str, param: str | None = None, retry_after: float | None = None
) -> TrimaranError:
    """The error again, as the class it was; `TrimaranError` if it was none of the hierarchy."""
    cls = getattr(errors, kind, None)
    if cls is QueueFullError:
        return QueueFullError(message, retry_after=retry_after or 1.0)
    if isinstance(cls, type) and issubclass(cls, TrimaranError):
        return cls(message, param=param)
    return TrimaranError(message, param=param)
