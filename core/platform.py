"""Choosing a platform by name, with the engine's own error."""

from __future__ import annotations

from ..platforms.interface import Platform, PlatformUnavailable
from ..platforms.registry import choose
from .errors import PlatformError


def make_platform(name: str = "auto") -> Platform:
    """The platform `name`, or the best usable one. PlatformError lists each with its reason."""
    try:
        return choose(name)()
    except PlatformUnavailable as error:
        raise PlatformError(str(error), param="platform") from None
