"""The Host header: well-formed always, and on a loopback address one of the names expected there.

A page of any site can make a browser resolve the site's own name to 127.0.0.1 (DNS rebinding);
its requests then carry that name.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable

from ..errors import HTTPError
from .asgi import ASGIApp, Receive, Scope, Send, header_values

_HOST = re.compile(r"(?P<name>\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,253})(?::\d{1,5})?")
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def allowed_names(bound: str | None, extra: Iterable[str]) -> frozenset[str] | None:
    """The names to accept; None where any will do (another address, or a Unix socket)."""
    names = frozenset(name.lower() for name in extra)
    if bound is not None and is_loopback(bound):
        own = f"[{bound}]" if ":" in bound else bound.lower()
        return names | LOOPBACK_NAMES | {own}
    if bound is not None and names:
        return names | LOOPBACK_NAMES | {bound.lower()}
    return None


class HostMiddleware:
    """400 for a Host that is malformed, missing or doubled; 403 for one that is not expected."""

    def __init__(self, app: ASGIApp, names: frozenset[str] | None) -> None:
        self.app = app
        self.names = names

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self._check(scope)
        await self.app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        values = header_values(scope, b"host")
        if not values and scope["http_version"] == "1.0":
            return
        match = _HOST.fullmatch(values[0].decode("latin-1")) if len(values) == 1 else None
        if match is None:
            raise HTTPError(400, "The Host header is malformed.", code="bad_host")
        if self.names is not None and match["name"].lower() not in self.names:
            raise HTTPError(
                403,
                "This Host name is not served here; the operator may add it with --allowed-hosts.",
                code="host_not_allowed",
            )
