"""Small helpers over ASGI scopes."""

from __future__ import annotations

from starlette._utils import get_route_path as route_path  # what its router compares
from starlette.types import ASGIApp, Message, Receive, Scope, Send

__all__ = [
    "ASGIApp",
    "Message",
    "Receive",
    "Scope",
    "Send",
    "header",
    "header_values",
    "route_path",
]


def header_values(scope: Scope, name: bytes) -> list[bytes]:
    """Every value of a header; `name` in lower case."""
    return [value for key, value in scope["headers"] if key == name]


def header(scope: Scope, name: bytes) -> bytes | None:
    """The header's value if it stands there exactly once, else None."""
    values = header_values(scope, name)
    return values[0] if len(values) == 1 else None
